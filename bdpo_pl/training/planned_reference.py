"""The memory that the reference will need while pairs are scored: on each device, and on each machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bdpo_pl.models.causal_lm import ModelConfig
from bdpo_pl.models.loading import ModelSource, load_config
from bdpo_pl.training.parameter_counts import Devices, count_parameters


@dataclass(frozen=True)
class HostReference:
    """Host memory of a machine for the reference.

    Attributes:
        shared: bytes of weights that are mapped from files, one copy for all processes.
        each: bytes that each process holds separately.
        processes: number of processes on the machine.
    """

    shared: int
    each: int
    processes: int

    @property
    def total(self) -> int:
        """Number of bytes of all processes together."""
        return self.shared + self.processes * self.each

    @property
    def label(self) -> str:
        """Label of the total in the plan's table."""
        own = f" and {self.each / 2**30:,.3f} in each" if self.each else ""
        return f"reference on each machine: {self.shared / 2**30:,.3f} shared by {self.processes} processes{own}"


def plan_reference(
    source: ModelSource, config: ModelConfig, dtype: torch.dtype, devices: Devices, products: torch.dtype | None = None
) -> int:
    """Compute the bytes of the reference's weights on one device, as `scoring.reference` holds them.

    Args:
        source: reference model.
        config: transformers configuration of the model.
        dtype: dtype of the weights.
        devices: devices over which the policy is distributed. If it is split, FSDP2 splits the reference over all of
            them.
        products: dtype of autocast, in which linear layers are then held; None: all weights are held in `dtype`.
    """
    counts = count_parameters(source, config, dtype, None, Devices(kind=devices.kind))
    narrow = (products or dtype).itemsize
    ranks = devices.data * devices.tensor
    if devices.sharded and (ranks > 1 or devices.cpu_offload):
        own = 0 if devices.cpu_offload else counts.all * narrow / ranks
        return round(own + (counts.outside + 2 * counts.block) * narrow)
    text = config.get_text_config()
    # Embeddings are not multiplied; norms are too small to count.
    return (
        counts.all - text.vocab_size * text.hidden_size
    ) * narrow + text.vocab_size * text.hidden_size * dtype.itemsize


def plan_offloaded_reference(
    source: ModelSource, config: ModelConfig, dtype: torch.dtype, devices: Devices, products: torch.dtype | None
) -> int:
    """Compute the bytes of the reference's weights that one process keeps on the host under CPU offload.

    The arguments are those of `plan_reference`.
    """
    counts = count_parameters(source, config, dtype, None, Devices(kind=devices.kind))
    return round(counts.all * (products or dtype).itemsize / (devices.data * devices.tensor))


def plan_host(source: ModelSource, dtype: torch.dtype, products: torch.dtype | None, processes: int) -> HostReference:
    """Plan the host memory of a reference that each of `processes` processes loads, as `scoring.reference` does.

    With a GPU, it is needed while the model is loaded; with a CPU, as long as the model exists.

    Args:
        source: reference model.
        dtype: dtype of the weights.
        products: dtype in which linear layers are held; None: all weights are held in `dtype`.
        processes: number of processes on each machine.
    """
    config = load_config(source)
    counts = count_parameters(source, config, dtype, None, Devices())
    text = config.get_text_config()
    table = text.vocab_size * text.hidden_size
    stored = getattr(config, "dtype", None) or torch.float32
    folder = Path(source.name).expanduser()
    mapped = not folder.exists() or any(folder.glob("*.safetensors"))
    shared = each = 0
    for number, held in ((counts.all - table, products or dtype), (table, dtype)):
        if mapped and held == stored:
            shared += number * held.itemsize
        else:
            each += number * held.itemsize
    return HostReference(shared, each, processes)
