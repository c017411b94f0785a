"""FSDP2's CPU offload: weights, gradients and the optimiser's state in the host's memory, products on the device.

Each rank keeps its part of every weight on the host. FSDP2 copies it to the device before it gathers the whole weight,
and copies the part of its gradient back. The optimiser's step is taken on the host.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from bdpo_pl.errors import InputError

BACKEND = "cpu:gloo,cuda:nccl"
"""Backends of the processes' groups: NCCL has no operations on host tensors, such as the sum of gradients' norms."""


def check_cpu_offload(kind: str, precision: str) -> None:
    """Raise `InputError` if weights cannot be kept on the host.

    Args:
        kind: type of the devices that compute, `cpu` or `cuda`.
        precision: Lightning's name of the precision.
    """
    if kind == "cpu":
        raise InputError(
            "trainer.strategy.cpu_offload keeps weights, gradients and the optimiser's state in the host's memory, "
            "where they are anyway if the processes compute on CPUs; leave it out, or set trainer.accelerator to gpu"
        )
    if precision.startswith("16"):
        raise InputError(
            f"trainer.strategy.cpu_offload leaves gradients on the host, and precision {precision} scales them on the "
            "device; set trainer.precision to bf16-mixed"
        )


def backend_for(given: str | None, kind: str) -> str | None:
    """Return the backend for the groups of processes that compute on devices of type `kind`.

    Args:
        given: backend that the user named; None: the default.
        kind: type of the devices.

    Raises:
        InputError: the named one has no operations on host tensors.
    """
    if given is not None and "cpu:" not in given and given != "gloo":
        raise InputError(
            f"trainer.strategy.process_group_backend is {given}, which has no operations on the host tensors of "
            f"cpu_offload; set it to {BACKEND}, or leave it out"
        )
    return BACKEND if given is None and kind == "cuda" else given


def offload_policy(on: bool, device: torch.device) -> OffloadPolicy:
    """Return FSDP2's policy; weights are in pinned memory, from which a GPU copies while it computes."""
    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if on else OffloadPolicy()


def move_other_parts(module: nn.Module, device: torch.device) -> None:
    """Move `module` to `device`, all but its children with split weights, whose buffers are there already."""
    split = {
        name: child
        for name, child in module.named_children()
        if any(isinstance(parameter, DTensor) for parameter in child.parameters())
    }
    # None stands for a child that is absent.
    module._modules.update(dict.fromkeys(split))
    try:
        module.to(device)
    finally:
        module._modules.update(split)
