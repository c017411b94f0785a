"""The memory that a run will need on each device, computed without allocating the model.

Weights, gradients and optimiser state are counted. Activations are recorded: the model's forward pass runs on the meta
device, where tensors have shapes but no memory, and the tensors that it saves for the backward pass are summed. If all
layers are alike, it is recorded with one and with two of them, whose difference is the size of each further layer.

Shapes: R rows; T positions; N scored tokens; D hidden size; V vocabulary. All results are bytes on one device.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.table import Table

from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.data.stripes import stripe_of
from bdpo_pl.data.table import PairTable
from bdpo_pl.forward.masks import why_not_shared
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.causal_lm import ModelConfig
from bdpo_pl.models.loading import ModelSource, load_config, num_positions
from bdpo_pl.models.precision import autocast_dtype, resolve_dtype
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.optimizer_state import state_bytes
from bdpo_pl.training.parameter_counts import Devices, MetaModel, count_parameters, split_config
from bdpo_pl.training.planned_activations import plan_activations, plan_logits
from bdpo_pl.training.planned_batches import longest_batch, pairs_to_fill, worst_batch
from bdpo_pl.training.planned_host import HostMemory
from bdpo_pl.training.planned_reference import HostReference, plan_host, plan_offloaded_reference, plan_reference
from bdpo_pl.training.start_checks import device_kind

# bitsandbytes' nf4 with double quantisation: 4 bits per weight, and 0.127 for its scales (arXiv:2305.14314).
_NF4_BYTES = (4 + 0.127) / 8


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        weights: parameters.
        gathered: FSDP2's whole copies of the weights in use (embedding, LM head, two blocks), or autocast's copies.
        optimizer: state of the optimiser.
        gradients: gradients of trained parameters after the backward pass, including DDP's buckets.
        activations: tensors saved for the backward pass.
        logits_chunk: one chunk of logits, and the LM head's gradients, which are computed in the forward pass.
        reference: weights of the reference while pairs are scored, including FSDP2's whole copies.
        live: true if the reference stays in memory; otherwise it is freed before the policy is loaded.
        host: host memory for the reference of a machine whose processes each load it.
        layer: activations of one layer, in whose backward pass all other gradients exist.
        offloaded: host memory for what is kept there instead of on the device.
    """

    weights: int
    gathered: int
    optimizer: int
    gradients: int
    activations: int
    logits_chunk: int
    reference: int = 0
    live: bool = False
    host: HostReference | None = None
    layer: int = 0
    offloaded: HostMemory | None = None

    @property
    def peak(self) -> int:
        """Larger of two sums: after the loss, before anything is freed; and when all gradients exist."""
        held = self.weights + self.optimizer + self.gathered + (self.reference if self.live else 0)
        return held + max(self.activations + self.logits_chunk, self.gradients + self.layer)

    def table(self) -> Table:
        """Return the plan as a table for the terminal."""
        table = Table(title="Memory on each device", title_justify="left")
        table.add_column("")
        table.add_column("GiB", justify="right")
        for name, label in (
            ("weights", "weights"),
            ("gathered", "gathered or cast copies of weights"),
            ("optimizer", "optimiser state"),
            ("gradients", "gradients"),
            ("activations", "activations"),
            ("layer", "activations of one layer, beside all gradients"),
            ("logits_chunk", "logits chunk and the LM head's gradients"),
            ("peak", "peak"),
        ):
            table.add_row(label, f"{getattr(self, name) / 2**30:,.3f}", end_section=name == "logits_chunk")
        if self.reference:
            kept = "in the peak" if self.live else "freed before the policy is loaded"
            table.add_row(f"reference's weights, {kept}", f"{self.reference / 2**30:,.3f}")
        if self.host is not None:
            table.add_row(self.host.label, f"{self.host.total / 2**30:,.3f}")
        if self.offloaded is not None:
            table.add_row(self.offloaded.label, f"{self.offloaded.total / 2**30:,.3f}")
        table.caption = (
            "peak: gradients replace activations, all but one layer's, so only the larger counts; the allocator's own "
            "share is not included"
        )
        return table


def plan_memory(
    source: ModelSource,
    config: ModelConfig,
    batch: SequenceBatch,
    dtype: torch.dtype,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    devices: Devices,
    *,
    lora: LoraOptions | None = None,
    gradient_checkpointing: bool = False,
    activation_offloading: bool = False,
    half_products: torch.dtype | None = None,
) -> MemoryPlan:
    """Compute the memory of a training step on one device.

    Args:
        source: model, for messages and its attention implementation.
        config: transformers configuration of the model; no weights are read.
        batch: micro-batch on the CPU, or this device's share of its rows.
        dtype: dtype of the weights.
        optimizer: function that makes the optimiser, which takes a step on small matrices.
        devices: devices over which the model is distributed.
        lora: options of the adapters, if only adapters are trained.
        gradient_checkpointing: true if activations are recomputed.
        activation_offloading: true if activations are moved to the host.
        half_products: dtype of autocast's products; None without autocast.
    """
    counts = count_parameters(source, config, dtype, lora, devices)
    shards = devices.data if devices.sharded else 1
    width = dtype.itemsize
    # Adapters are in float32; modules that are trained whole beside them have the model's dtype.
    wide = counts.trained_wide if lora is not None and width < 4 else 0
    trained = wide * 4 + (counts.trained - wide) * width
    quantises = lora is not None and lora.quantize == "nf4"
    quantised, block_quantised = (counts.linear, counts.block_linear) if quantises else (0, 0)
    frozen = counts.all - counts.trained - quantised
    weights = (quantised * _NF4_BYTES + frozen * width + trained) / shards
    product = (half_products or dtype).itemsize
    casts = half_products is not None and half_products != dtype
    gathered, moved_casts = 0.0, 0
    if devices.gathers:
        # FSDP2 gathers a block while the previous one computes.
        gathered = (counts.outside + 2 * counts.block) * product
    elif casts and activation_offloading and not gradient_checkpointing:
        # Autocast's copies of the layers' weights are saved as activations are, and moved with them.
        gathered = (counts.outside + 2 * (counts.block - block_quantised)) * product
        moved_casts = (counts.all - counts.outside - quantised) * product
    elif casts:
        # Quantised layers are multiplied outside of autocast.
        gathered = (counts.all - quantised) * product
    gradients = trained / shards
    others = counts.trained - counts.trained_hidden
    # Such modules are mostly tables.
    narrow = min(others, counts.trained - wide) if wide else 0
    held_in = torch.float32 if wide else dtype
    state = state_bytes(optimizer, counts.trained_hidden, others - narrow, held_in, counts.trained_uneven) / shards
    if narrow:
        state += state_bytes(optimizer, 0, narrow, dtype) / shards
    small = copy.deepcopy(config)
    split_config(small, devices.tensor)
    activations = plan_activations(
        source,
        small,
        batch,
        half_products or dtype,
        lora,
        gradient_checkpointing=gradient_checkpointing,
        offloading=activation_offloading,
    )
    offloaded = HostMemory(activations=activations.host + moved_casts)
    if devices.cpu_offload:
        offloaded = dataclasses.replace(
            offloaded, weights=round(weights), gradients=round(gradients), optimizer=round(state)
        )
        weights = gradients = state = 0.0
    if devices.gathers:
        # Those of one block, before they are scattered.
        gradients += counts.trained_block * product
    elif devices.data > 1:
        # DDP's buckets are a second copy.
        gradients *= 2
    return MemoryPlan(
        round(weights),
        round(gathered),
        round(state),
        round(gradients),
        activations.device,
        plan_logits(config, batch, half_products or dtype, devices, dtype if lora is None else None),
        layer=activations.layer,
        offloaded=offloaded if offloaded.each else None,
    )


def planned(
    trainer: L.Trainer,
    module: PreferenceModule,
    data: PreferenceDataModule,
    *,
    pairs: int | None = None,
    longest: PairTable | None = None,
    gradient_checkpointing: bool | None = None,
    activation_offloading: bool | None = None,
    cpu_offload: bool | None = None,
    lora: LoraOptions | None = None,
) -> MemoryPlan:
    """Compute the plan of a run before it begins, for its largest micro-batch with the longest possible pairs.

    Args:
        trainer: Trainer, for its strategy, precision and devices.
        module: module of the run.
        data: data module of the run.
        pairs: number of pairs in a micro-batch. Default: as in `data`.
        longest: pairs whose longest ones fill the micro-batch. Default: pairs that fill the window.
        gradient_checkpointing: true if activations are recomputed. Default: as in `module`.
        activation_offloading: true if activations are moved to the host. Default: as in `module`.
        cpu_offload: true if FSDP2 keeps weights on the host. Default: as in the Trainer's strategy.
        lora: options of the adapters. Default: as in `module`.

    Raises:
        InputError: there is no such model. Options that contradict each other are found by `check_start`.
    """
    strategy = trainer.strategy
    if cpu_offload is None:
        cpu_offload = bool(getattr(strategy, "cpu_offload", False))
    if activation_offloading is None:
        activation_offloading = module.activation_offloading
    sharded = isinstance(strategy, ModelParallelStrategy) or cpu_offload
    world = trainer.num_nodes * trainer.num_devices
    asked = getattr(strategy, "_tensor_parallel_size", 1)
    # In Lightning, `auto` means all devices of a node.
    tensor = (trainer.num_devices if asked == "auto" else int(asked)) if sharded else 1
    devices = Devices(max(1, world // tensor), tensor, sharded, device_kind(trainer), cpu_offload)
    config = load_config(module.source)
    sharing = int(getattr(strategy, "context_parallel_size", 1))
    window = data.max_length or min(data.truncation.max_length, num_positions(config) or data.truncation.max_length)
    described = MetaModel(module.source, config, torch.float32, None)
    shared = module.prefix_sharing != "never" and why_not_shared(described.built) is None
    if data.max_tokens_per_batch is not None:
        pairs = pairs_to_fill(data.max_tokens_per_batch, longest, window, shared)
    elif pairs is None:
        pairs = data.batch_size
    batch = worst_batch(pairs, window, shared) if longest is None else longest_batch(longest, pairs, shared)
    plan = plan_memory(
        module.source,
        config,
        batch if sharing == 1 else stripe_of(batch, 0, sharing),
        resolve_dtype(module.dtype_name, str(trainer.precision)),
        module.optimizer,
        devices,
        lora=lora or module.lora,
        gradient_checkpointing=module.gradient_checkpointing
        if gradient_checkpointing is None
        else gradient_checkpointing,
        activation_offloading=activation_offloading,
        half_products=autocast_dtype(str(trainer.precision)),
    )
    offloaded = plan.offloaded
    if offloaded is not None:
        offloaded = dataclasses.replace(offloaded, processes=trainer.num_devices)
        plan = dataclasses.replace(plan, offloaded=offloaded)
    own = module.lora is not None and module.own_reference
    if module.reference_mode == "none" or (module.reference_mode == "live" and own):
        return plan
    dtype, live = module.dtype_of_reference(str(trainer.precision)), module.reference_mode == "live"
    products = None if live else autocast_dtype(str(trainer.precision))
    source, config = module.reference_source, load_config(module.reference_source)
    reference = plan_reference(source, config, dtype, devices, products)
    host = None
    if offloaded is not None and cpu_offload:
        kept = plan_offloaded_reference(source, config, dtype, devices, products)
        offloaded = dataclasses.replace(offloaded, reference=kept, live=live)
    elif not own and not sharded and trainer.num_devices > 1:
        host = plan_host(source, dtype, products, trainer.num_devices)
    return dataclasses.replace(plan, reference=reference, live=live, host=host, offloaded=offloaded)
