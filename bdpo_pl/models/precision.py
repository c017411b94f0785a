"""Dtype and device of a model: by name, by `auto`, and by Lightning's precision."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bdpo_pl.errors import InputError, first_line


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype in which autocast multiplies under Lightning's `precision`; None without autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def half_products(precision: str) -> torch.dtype | None:
    """Return the dtype in which FSDP2 sends and multiplies weights; None: their own dtype."""
    return torch.bfloat16 if precision == "bf16-mixed" else None


def resolve_dtype(name: str, precision: str) -> torch.dtype:
    """Return the dtype of the weights: `name`, or for `auto` the one that Lightning's `precision` requires."""
    if name != "auto":
        return getattr(torch, name)
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)


def choose_dtype(name: str, device: torch.device, option: str = "dtype") -> torch.dtype:
    """Return the dtype called `name`; `auto` is bfloat16 on a GPU that supports it, otherwise float32.

    Args:
        name: name of a dtype, or `auto`.
        device: device of the model.
        option: name of the option, for the message.

    Raises:
        InputError: there is no such dtype.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"{option} must be auto, float32, bfloat16 or float16, not {name!r}")
    return getattr(torch, name)


def choose_device(name: str, option: str = "device") -> torch.device:
    """Return the device called `name`; `auto` is the first GPU if there is one, otherwise the CPU.

    Args:
        name: name of a device, as in PyTorch, or `auto`.
        option: name of the option, for the message.

    Raises:
        InputError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{option} {name!r} is not available here ({first_line(error)}); try cpu") from None
    return device


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which `model` computes: its weights', or its mesh's if FSDP2 keeps weights on the host."""
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor) or parameter.device.type == parameter.device_mesh.device_type:
        return parameter.device
    kind = parameter.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def most_processes() -> int:
    """Return the largest number of processes, each with a model of its own, that may be started on this CPU."""
    return max(8, os.cpu_count() or 1)


def choose_devices(name: str, count: int | str) -> list[torch.device]:
    """Return the devices that each hold the whole model; the first is that of `choose_device`.

    Args:
        name: name of a device, as in `choose_device`.
        count: number of devices, or `auto`: all GPUs, or one of any other kind. A CPU counts as often as wanted.

    Raises:
        InputError: the machine has fewer devices, or `name` is that of a single one.
    """
    first = choose_device(name)
    if count == 1 or (count == "auto" and first.type != "cuda"):
        return [first]
    if first.type == "cpu":
        if int(count) > most_processes():
            raise InputError(
                f"devices is {count}, and on a CPU each is a process with the whole model; set it to at most "
                f"{most_processes()}"
            )
        return [first] * int(count)
    if first.index is not None:
        raise InputError(f"device {name} is a single one, and devices is {count}; leave one of the two out")
    there = torch.cuda.device_count() if first.type == "cuda" else 1
    wanted = there if count == "auto" else int(count)
    if wanted > there:
        raise InputError(f"devices is {count}, and the {first.type} devices of this machine are {there}; lower it")
    return [torch.device(first.type, index) for index in range(wanted)]
