"""Activations in the host's memory: what the layers save for the backward pass waits there until it is needed.

The copies run in the order of the device's other work, not beside it. A tensor's memory is therefore free as soon as
the layers have read it, and the next layer's activations take its place; copies on a stream of their own would take
less time, but their tensors would stay until the copies are done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bdpo_pl.errors import InputError
from bdpo_pl.models.architectures import decoder_layers
from bdpo_pl.models.causal_lm import CausalLM

MIN_BYTES = 2**20
"""Bytes from which on a tensor is moved: the copy of a smaller one takes about as long as its launch."""


def check_activation_offloading(kind: str, compiled: bool) -> None:
    """Raise `InputError` if activations cannot be moved to the host.

    Args:
        kind: type of the device that computes, `cpu` or `cuda`.
        compiled: true if layers are compiled.
    """
    if kind == "cpu":
        raise InputError(
            "model.activation_offloading moves activations to the host's memory, where they are anyway if the policy "
            "is trained on a CPU; leave it out, or set trainer.accelerator to gpu"
        )
    if compiled:
        raise InputError(
            "model.activation_offloading has not been tried on compiled layers; leave out model.compile, or "
            "model.activation_offloading"
        )


def storages(parameters: Iterable[Tensor]) -> set[int]:
    """Return the identities of the memory of `parameters`."""
    return {_identity(parameter) for parameter in parameters}


def moves(tensor: Tensor, kept: set[int]) -> bool:
    """Return true if the memory of a saved `tensor` is moved to the host.

    Args:
        tensor: tensor that a layer saves.
        kept: memory of parameters, which is on the device anyway.
    """
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return False
    size = tensor.untyped_storage().nbytes()
    if size < MIN_BYTES or size % tensor.itemsize or tensor.is_conj() or tensor.is_neg():
        return False
    return _identity(tensor) not in kept


class OffloadedActivations:
    """Moves what the layers of a model save to the host, and back when their gradients are computed.

    What the LM head and the loss save stays: it is needed first. Memory that several operations have saved is copied
    once, and back once for those of them that follow each other. With gradient checkpointing, the inputs of the layers
    are all that is saved in the forward pass.

    Args:
        model: causal language model, in which hooks are put.
        device: device that computes, whose tensors are moved.

    Raises:
        InputError: the layers of the model are not recognised.
    """

    def __init__(self, model: CausalLM, device: torch.device) -> None:
        self._device = device
        self._parameters: set[int] = set()
        self._moved: dict[int, _Moved] = {}
        self._open: list[torch.autograd.graph.saved_tensors_hooks] = []
        stack = _layer_stack(model)
        # FSDP2 gathers the parameters of a module just before it runs; its hooks come first.
        for module in stack.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._note_parameters)
        stack.register_forward_pre_hook(self._enter)
        stack.register_forward_hook(self._leave, always_call=True)

    def _note_parameters(self, module: nn.Module, _: object) -> None:
        self._parameters |= storages(module.parameters(recurse=False))

    def _enter(self, module: nn.Module, _: object) -> None:
        self._parameters = storages(module.parameters(recurse=False))
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._open.append(hooks)

    def _leave(self, module: nn.Module, _: object, __: object) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)
        self._moved = {}

    def _pack(self, tensor: Tensor) -> Tensor | _Part:
        if tensor.device.type != self._device.type or not moves(tensor, self._parameters):
            return tensor
        found = self._moved.get(_identity(tensor))
        # Memory that was written to since has other values.
        if found is None or found.version != tensor._version:
            found = self._moved[_identity(tensor)] = _Moved(tensor)
        found.parts += 1
        return _Part(found, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


@dataclass(frozen=True)
class _Part:
    """A tensor that lies in moved memory."""

    moved: _Moved
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Moved:
    """Memory that was moved to the host.

    Attributes:
        version: version of its values, which an operation in place changes.
        parts: number of saved tensors in it that have not come back.
    """

    def __init__(self, tensor: Tensor) -> None:
        # As long as this is held, no other memory gets the same identity.
        self.source = StorageWeakRef(tensor.untyped_storage())
        self.device = tensor.device
        self.version = tensor._version
        self.parts = 0
        self._back: Tensor | None = None
        flat = _flat(tensor)
        self._host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=tensor.is_cuda)
        self._host.copy_(flat, non_blocking=tensor.is_cuda)

    def back(self) -> Tensor:
        """Return the memory on its device; it stays there until its last saved tensor has come back."""
        found = (
            self._host.to(self.device, non_blocking=self.device.type == "cuda") if self._back is None else self._back
        )
        self.parts -= 1
        self._back = found if self.parts > 0 else None
        return found


def _unpack(packed: Tensor | _Part) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.moved.back().view(packed.dtype).as_strided(packed.size, packed.stride, packed.offset)


def _flat(tensor: Tensor) -> Tensor:
    """Return the bytes of the memory in which `tensor` lies."""
    elements = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.detach().as_strided((elements,), (1,), 0).view(torch.uint8)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _layer_stack(model: CausalLM) -> nn.Module:
    """Return the module of `model` that runs its layers, and not the LM head."""
    layers, head = decoder_layers(model), model.get_output_embeddings()
    for module in model.modules():
        if layers is not None and any(child is layers for child in module.children()):
            if all(inner is not head for inner in module.modules()):
                return module
            break
    raise InputError(
        f"model.activation_offloading: the layers of {type(model).__name__} are not recognised; leave it out, or set "
        "model.gradient_checkpointing to true"
    )
