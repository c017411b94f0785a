"""The memory of a forward pass that the backward pass needs, recorded on the meta device: on each device, on the host.

Shapes: R rows; T positions; N scored tokens; D hidden size; V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from bdpo_kernels.chunks import head_bytes
from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.forward.last_layer import scored_positions_only
from bdpo_pl.forward.masks import model_inputs
from bdpo_pl.forward.responses import head_input
from bdpo_pl.models import activation_offloading
from bdpo_pl.models.activation_offloading import moves, storages
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.architectures import decoder_layers
from bdpo_pl.models.causal_lm import CausalLM, ModelConfig
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.training.meta_attention import operations_as_on_devices
from bdpo_pl.training.parameter_counts import Devices, MetaModel, layers_are_alike, with_layers


@dataclass(frozen=True)
class Activations:
    """Bytes of activations.

    Attributes:
        device: bytes on the device at the end of the forward pass; if they are recomputed and not moved to the host,
            with those of one layer.
        layer: bytes on the device in the backward pass of the first layer, the last to be computed, with the gradients
            of its hidden states.
        host: bytes moved to the host by one process.
    """

    device: int
    layer: int
    host: int = 0


def plan_activations(
    source: ModelSource,
    config: ModelConfig,
    batch: SequenceBatch,
    dtype: torch.dtype,
    lora: LoraOptions | None,
    *,
    gradient_checkpointing: bool,
    offloading: bool,
) -> Activations:
    """Compute the bytes of activations of one device.

    Args:
        source: model, for messages and its attention implementation.
        config: transformers configuration of the model that the device computes.
        batch: micro-batch on the CPU, or this device's share of its rows.
        dtype: dtype of the products.
        lora: options of the adapters, if only adapters are trained.
        gradient_checkpointing: true if activations are recomputed.
        offloading: true if activations are moved to the host.
    """
    layers = config.get_text_config().num_hidden_layers
    shapes, least = _Shapes(batch), activation_offloading.MIN_BYTES

    def kept(config: ModelConfig) -> _Kept:
        return _kept(MetaModel(source, config, dtype, lora), shapes, gradient_checkpointing, least)

    if layers_are_alike(source, config):
        one, two = kept(with_layers(config, 1)), kept(with_layers(config, 2))
        more = two.stays - one.stays, two.moved - one.moved
        stays, moved = one.stays + (layers - 1) * more[0], one.moved + (layers - 1) * more[1]
        layer, single = sum(more), one.stays + one.moved
    else:
        whole = kept(config)
        stays, moved, layer = whole.stays, whole.moved, max(whole.layers)
        single = stays + moved - sum(whole.layers) + layer
    R, T = batch.input_ids.shape
    t = T if batch.stripe is None else T // batch.stripe[1]
    # The hidden states that enter a layer.
    entering = R * t * config.get_text_config().hidden_size * dtype.itemsize
    last = layer + 2 * entering
    if gradient_checkpointing:
        # The input of each layer is saved, and all tensors of one layer at a time.
        if offloading and entering >= activation_offloading.MIN_BYTES:
            return Activations(entering, last + entering, layers * entering)
        return Activations(single + layers * entering, last)
    if not offloading:
        return Activations(stays + moved, last)
    return Activations(stays, last, moved)


@dataclass(frozen=True)
class _Kept:
    """Bytes that a forward pass saves for the backward pass.

    Attributes:
        stays: memory that is too small to be moved to the host.
        moved: all other memory.
        layers: memory of each layer, which one of the two includes; empty if the layers are not recognised.
    """

    stays: int
    moved: int
    layers: tuple[int, ...]


class _Shapes:
    """A batch on the meta device, where batches whose tensors have the same shapes are equal."""

    def __init__(self, batch: SequenceBatch) -> None:
        self.batch = batch.to(torch.device("meta"))
        values = [getattr(self.batch, field.name) for field in fields(batch)]
        self._key = tuple((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shapes) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=64)
def _kept(described: MetaModel, shapes: _Shapes, whole: bool, least: int) -> _Kept:
    """Return the bytes that a forward pass on the meta device saves for backward, without parameters.

    Memory of less than `least` bytes for each tensor is too small to be moved to the host.
    """
    model: CausalLM = described.built
    batch = shapes.batch
    own = storages(model.parameters())
    kept: dict[int, torch.UntypedStorage] = {}
    large: set[int] = set()
    # Number of storages at the start and at the end of each layer.
    ends: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Kept alive, so that no other storage can get the same address.
            kept[storage._cdata] = storage
            if moves(tensor, own):
                large.add(storage._cdata)
        return tensor

    inputs = model_inputs(model, batch)
    if not batch.masked:
        # In the worst case nothing is padded, so no mask is saved; transformers would read the mask to find that out.
        T = batch.input_ids.shape[1]
        mask = torch.empty(1, 1, T, T, dtype=torch.bool, device="meta")
        inputs["attention_mask"] = mask if getattr(model.config.get_text_config(), "num_attention_heads", 0) else None
    narrow = nullcontext() if whole else scored_positions_only(model, batch)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    counters = [
        handle
        for layer in decoder_layers(model) or ()
        for handle in (
            layer.register_forward_pre_hook(lambda *_: ends.append(len(kept))),
            layer.register_forward_hook(lambda *_: ends.append(len(kept))),
        )
    ]
    try:
        with (
            operations_as_on_devices(keeps_mask=batch.masked),
            narrow,
            head_input(model, lambda hidden: hidden[:, :0]),
            hooks,
        ):
            model.train()(**inputs)
    finally:
        for handle in counters:
            handle.remove()
    sizes = [storage.nbytes() for storage in kept.values()]
    moved = sum(size for key, size in zip(kept, sizes, strict=True) if key in large)
    layers = tuple(sum(sizes[start:end]) for start, end in zip(ends[::2], ends[1::2], strict=True))
    return _Kept(sum(sizes) - moved, moved, layers)


def plan_logits(
    config: ModelConfig, batch: SequenceBatch, dtype: torch.dtype, devices: Devices, weight_dtype: torch.dtype | None
) -> int:
    """Return the bytes of the LM head's operation; `weight_dtype` is None if the head is frozen."""
    text = config.get_text_config()
    v, D, N = -(-text.vocab_size // devices.tensor), text.hidden_size, len(batch.labels)
    # This includes the packed hidden states and their gradient.
    return 2 * N * D * dtype.itemsize + head_bytes(N, v, D, dtype, torch.device(devices.kind), weight_dtype)
