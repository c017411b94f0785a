"""Dtype and device of a model: by name, by `auto`, and by Lightning's precision."""

from __future__ import annotations

import torch

from bdpo_pl.errors import InputError, first_line


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype in which autocast multiplies under Lightning's `precision`; None without autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def half_products(precision: str) -> torch.dtype | None:
    """Return the dtype in which FSDP2 sends and multiplies weights; None: their own dtype."""
    return torch.bfloat16 if precision == "bf16-mixed" else None


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
