"""Conversion between split and whole tensors: the contents of checkpoints and exports are always whole.

A checkpoint therefore does not depend on the strategy that wrote it: a run saved under FSDP2 can be resumed under DDP
or on one device, and vice versa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bdpo_pl.models.adapter_start import START
from bdpo_pl.models.tied import shared_where_tied

DATA, TENSOR, CONTEXT = "data_parallel", "tensor_parallel", "context_parallel"


def local_ranges(tensor: Tensor) -> tuple[slice, ...]:
    """Return the ranges of this rank's part of `tensor`, dimension by dimension."""
    ranges = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names or ()
        # FSDP2 splits what remains of a weight after tensor parallelism.
        for number in sorted(range(mesh.ndim), key=lambda i: names[i] == DATA):
            dim = getattr(tensor.placements[number], "dim", None)
            if dim is not None:
                start, end = ranges[dim]
                size = -(-(end - start) // mesh.size(number))
                first = min(end, start + mesh.get_local_rank(number) * size)
                ranges[dim] = (first, min(end, first + size))
    return tuple(slice(start, end) for start, end in ranges)


def split_like(
    like: Tensor, read: Callable[[tuple[slice, ...]], Tensor], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the result of `read` for this rank's part of `like`, on `device`, in `dtype` (default: that of `like`).

    The returned tensor is split as `like` is, or whole if `like` is whole.
    """
    local = read(local_ranges(like)).to(device=device, dtype=dtype or like.dtype).contiguous()
    return as_part(local, like) if isinstance(like, DTensor) else local


def as_part(local: Tensor, like: DTensor) -> DTensor:
    """Return the tensor that is split as `like` is, and whose part on this rank is `local`, on its device."""
    assert local.shape == like.to_local().shape
    part = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    # PyTorch has moved it to the device of the mesh.
    kept = part.to(local.device)
    assert isinstance(kept, DTensor)
    return kept


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor`, in the same memory; to write to it, call this without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor`. All ranks call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Drop the whole weights that FSDP2 has gathered for `model`: the parts have changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(model: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """Return parameters and buffers of `model` on the CPU, put together from all ranks.

    The result is complete on rank 0, and may be empty on other ranks. All ranks call this function.

    Args:
        model: model, whole or split.
        trained_only: return only trained weights, and the starts of adapters if the model keeps them.
    """
    if dist.is_available() and dist.is_initialized():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        # Each name of a tied weight is gathered into a tensor of its own.
        found: dict[str, Any] = get_model_state_dict(model, options=options)
        return shared_where_tied(found, model) | (adapter_starts(model) if trained_only else {})
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad or name.endswith(START)}
    return {name: value.cpu() for name, value in model.state_dict().items() if not trained_only or name in kept}


def adapter_starts(model: nn.Module) -> dict[str, Tensor]:
    """Return the starts that the adapters of `model` keep, if any, whole and on the CPU. All ranks call this."""
    found = {name: p.detach() for name, p in model.named_parameters() if name.endswith(START)}
    return {name: whole(p).cpu() for name, p in found.items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy this rank's parts of the whole tensors of `state` into the parameters and buffers that `state` names."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in state:
                local_part(tensor).copy_(state[name][local_ranges(tensor)])


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return `optimizer.state_dict()` on rank 0 with every tensor whole and on the CPU.

    The other ranks only contribute their parts. An optimiser whose state is no split tensors has the methods
    `whole_values` and `part_values`, which take a parameter and its state.
    """
    state = optimizer.state_dict()
    keeps = dist.get_rank() == 0
    gathered = {}
    gather = getattr(optimizer, "whole_values", _whole_values)
    parameters = list(parameters_of(optimizer))
    for number, values in state["state"].items():
        # The device needs memory for a whole tensor, so they are gathered one at a time.
        found = gather(parameters[number], values)
        gathered[number] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in found.items()} if keeps else {}
    return {**state, "state": gathered}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load this rank's parts of the whole tensors of `state` into `optimizer`."""
    parts = {}
    divide = getattr(optimizer, "part_values", _part_values)
    for number, parameter in enumerate(parameters_of(optimizer)):
        if number in state["state"]:
            parts[number] = divide(parameter, state["state"][number])
    optimizer.load_state_dict({**state, "state": parts})


def _whole_values(_: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}


def _part_values(parameter: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _part_of(value, parameter) if isinstance(value, Tensor) else value for name, value in values.items()}


def _part_of(value: Tensor, parameter: Tensor) -> Tensor:
    if value.shape != parameter.shape:
        return value
    return split_like(parameter, lambda ranges: value[ranges], parameter.device, value.dtype)


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of `optimizer`, in the order of its state."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
