"""What the reference will need of memory while pairs are scored: on each device, and on each machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bdpo_pl.models.causal_lm import ModelConfig
from bdpo_pl.models.loading import ModelSource, load_config
from bdpo_pl.training.parameter_counts import Devices, count_parameters


@dataclass(frozen=True)
class HostReference:
    """The reference in the memory of a machine.

    Attributes:
        shared: bytes of weights mapped from its files, one copy for all processes.
        each: bytes that each process holds by itself.
        processes: of the machine.
    """

    shared: int
    each: int
    processes: int

    @property
    def total(self) -> int:
        """Bytes of all processes together."""
        return self.shared + self.processes * self.each

    @property
    def label(self) -> str:
        """What the number is of, for people."""
        own = f" and {self.each / 2**30:,.3f} in each" if self.each else ""
        return f"reference on each machine: {self.shared / 2**30:,.3f} shared by {self.processes} processes{own}"


def plan_reference(
    source: ModelSource, config: ModelConfig, dtype: torch.dtype, devices: Devices, products: torch.dtype | None = None
) -> int:
    """Give the bytes of the reference's weights on one device, as `scoring.reference` holds them.

    Args:
        source: the reference.
        config: its transformers configuration.
        dtype: of the weights.
        devices: how the policy is spread; where it is split, the reference is, over all of them by FSDP2.
        products: dtype that autocast multiplies in, which linear layers are then held in; None: all in `dtype`.
    """
    counts = count_parameters(source, config, dtype, None, Devices(kind=devices.kind))
    narrow = (products or dtype).itemsize
    ranks = devices.data * devices.tensor
    if devices.sharded and ranks > 1:
        return round(counts.all * narrow / ranks + (counts.outside + 2 * counts.block) * narrow)
    text = config.get_text_config()
    # Embeddings are not multiplied; norms are too small to count.
    return (
        counts.all - text.vocab_size * text.hidden_size
    ) * narrow + text.vocab_size * text.hidden_size * dtype.itemsize


def plan_host(source: ModelSource, dtype: torch.dtype, products: torch.dtype | None, processes: int) -> HostReference:
    """Plan the host memory of a reference that each of `processes` loads, as `scoring.reference` does.

    On a GPU it is what loading takes; on a CPU it is where the weights are.

    Args:
        source: the reference.
        dtype: of the weights.
        products: dtype that linear layers are held in; None: all in `dtype`.
        processes: on each machine.
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
