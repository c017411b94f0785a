"""What a run will need of each device's memory, without allocating the model.

Weights, gradients and optimiser are counted; activations are recorded: the model's own forward pass runs on the meta
device, where tensors have shapes and no memory, and every tensor that it keeps for the backward pass is added up. Two
depths are recorded, one and two layers, and the rest follows: all layers of these models are alike in size.

Shapes: R rows; T positions; N scored tokens; D hidden size; V vocabulary. All results are bytes on one device.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.table import Table
from torch import Tensor, nn

from bdpo_kernels.chunks import head_bytes
from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.data.table import PairTable
from bdpo_pl.forward.last_layer import scored_positions_only
from bdpo_pl.forward.masks import model_inputs
from bdpo_pl.forward.responses import head_input
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.loading import ModelSource, load_config, num_positions, resolve_dtype
from bdpo_pl.models.precision import autocast_dtype
from bdpo_pl.parallel.tensor_parallel import check_tensor_parallel
from bdpo_pl.training.meta_attention import attention_as_on_devices
from bdpo_pl.training.parameter_counts import (
    Devices,
    count_parameters,
    meta_model,
    split_config,
    with_layers,
)
from bdpo_pl.training.planned_batches import longest_batch, worst_batch
from bdpo_pl.training.planned_reference import HostReference, plan_host, plan_reference

# bitsandbytes' nf4 with double quantisation: 4 bits a weight, and 0.127 for its scales (arXiv:2305.14314).
_NF4_BYTES = (4 + 0.127) / 8


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        weights: parameters that stay.
        gathered: FSDP2's whole copies of what is computed with (embedding, LM head, two blocks), or autocast's copies.
        optimizer: its state.
        gradients: of trained parameters, after the backward pass; with DDP's buckets.
        activations: kept for the backward pass.
        logits_chunk: one chunk of logits and the LM head's own gradients, which are computed on the way forward.
        reference: weights of the reference, and of what FSDP2 gathers of them, while pairs are scored.
        live: whether the reference stays in memory; else it is freed before the policy is loaded.
        host: the reference in the memory of a machine whose processes each load it.
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

    @property
    def peak(self) -> int:
        """The larger of two moments: the loss is computed and nothing yet freed; all gradients are there."""
        held = self.weights + self.optimizer + self.gathered + (self.reference if self.live else 0)
        return held + max(self.activations + self.logits_chunk, self.gradients)

    def table(self) -> Table:
        """For people."""
        table = Table(title="Memory on each device", title_justify="left")
        table.add_column("")
        table.add_column("GiB", justify="right")
        for name, label in (
            ("weights", "weights"),
            ("gathered", "gathered or cast copies of weights"),
            ("optimizer", "optimiser state"),
            ("gradients", "gradients"),
            ("activations", "activations"),
            ("logits_chunk", "logits chunk and the LM head's gradients"),
            ("peak", "peak"),
        ):
            table.add_row(label, f"{getattr(self, name) / 2**30:,.3f}", end_section=name == "logits_chunk")
        if self.reference:
            kept = "in the peak" if self.live else "freed before the policy is loaded"
            table.add_row(f"reference's weights, {kept}", f"{self.reference / 2**30:,.3f}")
        if self.host is not None:
            table.add_row(self.host.label, f"{self.host.total / 2**30:,.3f}")
        table.caption = "peak: gradients come as activations go: the larger counts; without the allocator's own share"
        return table


def plan_memory(
    source: ModelSource,
    config: Any,
    batch: SequenceBatch,
    dtype: torch.dtype,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    devices: Devices,
    *,
    lora: LoraOptions | None = None,
    gradient_checkpointing: bool = False,
    half_products: torch.dtype | None = None,
) -> MemoryPlan:
    """Memory of a training step on one device.

    Args:
        source: the model, for messages and its attention implementation.
        config: its transformers configuration; nothing else of it is read.
        batch: a micro-batch, on the CPU.
        dtype: of the weights.
        optimizer: makes the optimiser, of which one step is taken on one small matrix.
        devices: how the model is spread.
        lora: adapters, if they are what is trained.
        gradient_checkpointing: whether activations are recomputed.
        half_products: dtype of autocast's products, if it is on.
    """
    counts = count_parameters(source, config, dtype, lora, devices)
    shards = devices.data if devices.sharded else 1
    width = dtype.itemsize
    trained_width = 4 if lora is not None else width
    base_width = _NF4_BYTES if lora is not None and lora.quantize == "nf4" else width
    frozen = counts.all - counts.trained
    weights = (frozen * base_width + counts.trained * trained_width) / shards
    product = (half_products or dtype).itemsize
    gathered = 0.0
    if devices.sharded and devices.data > 1:
        # A block is gathered while the one before it computes.
        gathered = (counts.outside + 2 * counts.block) * product
    elif half_products is not None and half_products != dtype:
        gathered = counts.all * product
    gradients = counts.trained * trained_width / shards
    if not devices.sharded and devices.data > 1:
        # DDP's buckets hold them once more.
        gradients *= 2
    elif devices.sharded and devices.data > 1:
        gradients += counts.trained_block * product
    small = copy.deepcopy(config)
    split_config(small, devices.tensor)
    activations = _activations(source, small, batch, half_products or dtype, gradient_checkpointing, lora)
    return MemoryPlan(
        round(weights),
        round(gathered),
        round(counts.trained / shards * state_width(optimizer, torch.float32 if lora is not None else dtype)),
        round(gradients),
        activations,
        _logits_chunk(config, batch, half_products or dtype, devices, dtype if lora is None else None),
    )


def planned(
    trainer: L.Trainer,
    module: Any,
    data: Any,
    *,
    pairs: int | None = None,
    longest: PairTable | None = None,
    gradient_checkpointing: bool | None = None,
    lora: LoraOptions | None = None,
) -> MemoryPlan:
    """The plan of a run that is set up and not begun: of its largest micro-batch, with the longest pairs it allows.

    Args:
        trainer: its strategy, precision and devices.
        module: a `PreferenceModule`.
        data: a `PreferenceDataModule`.
        pairs: in a micro-batch, in place of what `data` says.
        longest: pairs of which the longest count, in place of pairs that fill the window.
        gradient_checkpointing: in place of what `module` says.
        lora: adapters, in place of what `module` says.

    Raises:
        InputError: there is no such model.
    """
    strategy = trainer.strategy
    sharded = isinstance(strategy, ModelParallelStrategy)
    world = trainer.num_nodes * trainer.num_devices
    asked = getattr(strategy, "_tensor_parallel_size", 1)
    # Lightning's `auto` means the devices of a node.
    tensor = (trainer.num_devices if asked == "auto" else int(asked)) if sharded else 1
    devices = Devices(max(1, world // tensor), tensor, sharded, _kind(trainer))
    config = load_config(module.source)
    if tensor > 1:
        check_tensor_parallel(config, tensor, module.source.name)
    window = data.max_length or min(data.truncation.max_length, num_positions(config) or data.truncation.max_length)
    shared = module.prefix_sharing != "never"
    if pairs is None:
        pairs = data.batch_size
    if data.max_tokens_per_batch is not None:
        if longest is not None:
            window = int((longest.prompt_lengths + np.maximum(longest.chosen_lengths, longest.rejected_lengths)).max())
        pairs = max(1, data.max_tokens_per_batch // int(window * (1.5 if shared else 2)))
    plan = plan_memory(
        module.source,
        config,
        worst_batch(pairs, window, shared) if longest is None else longest_batch(longest, pairs, shared),
        resolve_dtype(module.dtype_name, str(trainer.precision)),
        module.optimizer,
        devices,
        lora=lora or module.lora,
        gradient_checkpointing=module.gradient_checkpointing
        if gradient_checkpointing is None
        else gradient_checkpointing,
        half_products=autocast_dtype(str(trainer.precision)),
    )
    own = module.lora is not None and module.own_reference
    if module.reference_mode == "none" or (module.reference_mode == "live" and own):
        return plan
    name = module.dtype_name if module.reference_dtype == "auto" else module.reference_dtype
    dtype = resolve_dtype(name, str(trainer.precision))
    products = autocast_dtype(str(trainer.precision)) if module.reference_mode == "precomputed" else None
    reference = plan_reference(module.reference_source, load_config(module.reference_source), dtype, devices, products)
    host = None
    if not own and not sharded and trainer.num_devices > 1:
        host = plan_host(module.reference_source, dtype, products, trainer.num_devices)
    return dataclasses.replace(plan, reference=reference, live=module.reference_mode == "live", host=host)


def _kind(trainer: L.Trainer) -> str:
    return "cuda" if isinstance(trainer.accelerator, CUDAAccelerator) else "cpu"


def _activations(
    source: ModelSource,
    config: Any,
    batch: SequenceBatch,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    lora: LoraOptions | None,
) -> int:
    layers = config.get_text_config().num_hidden_layers
    one, two = (
        _kept(meta_model(source, with_layers(config, depth), dtype, lora), batch, whole=gradient_checkpointing)
        for depth in (1, 2)
    )
    if not gradient_checkpointing:
        return one + (layers - 1) * (two - one)
    # What enters each layer, and one layer at a time in full.
    R, T = batch.input_ids.shape
    entering = R * T * config.get_text_config().hidden_size * dtype.itemsize
    return one + layers * entering


def _kept(model: Any, batch: SequenceBatch, whole: bool) -> int:
    """Bytes that a forward pass of `model`, on the meta device, keeps for the backward pass, parameters aside."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Held, so that no other storage takes its address.
            kept[storage._cdata] = storage
        return tensor

    batch = batch.to(torch.device("meta"))
    inputs = model_inputs(model, batch)
    if not batch.shared:
        # Nothing is padded in the worst case, where no mask is kept; transformers would look at its values to find out.
        T = batch.input_ids.shape[1]
        inputs["attention_mask"] = torch.empty(1, 1, T, T, dtype=torch.bool, device="meta")
    narrow = nullcontext() if whole else scored_positions_only(model, batch)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with (
        attention_as_on_devices(keeps_mask=batch.shared),
        narrow,
        head_input(model, lambda hidden: hidden[:, :0]),
        hooks,
    ):
        model.train()(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def _logits_chunk(
    config: Any, batch: SequenceBatch, dtype: torch.dtype, devices: Devices, weight_dtype: torch.dtype | None
) -> int:
    """Bytes of the LM head's operation; `weight_dtype` is None where the head is frozen."""
    text = config.get_text_config()
    v, D, N = -(-text.vocab_size // devices.tensor), text.hidden_size, len(batch.labels)
    # The packed hidden states and their gradient come with it.
    return 2 * N * D * dtype.itemsize + head_bytes(N, v, D, dtype, torch.device(devices.kind), weight_dtype)


def state_width(optimizer: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype) -> float:
    """Bytes of optimiser state for each parameter."""
    parameter = nn.Parameter(torch.zeros(8, 8, dtype=dtype))
    made = optimizer([{"params": [parameter]}])
    parameter.grad = torch.zeros_like(parameter)
    made.step()
    tensors = [value for value in made.state[parameter].values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.shape == parameter.shape) / parameter.numel()
