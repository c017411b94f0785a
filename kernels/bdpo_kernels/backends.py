"""Which implementation runs: Triton or PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch

Backend = Literal["triton", "torch"]


def resolve_backend(backend: Backend | None, device: torch.device) -> Backend:
    """The backend to run on `device`: the caller's choice, else Triton on CUDA and PyTorch everywhere else.

    Raises:
        ValueError: an unknown name, or Triton asked for on a device where it cannot run.
    """
    if backend is None:
        return "triton" if device.type == "cuda" and has_triton() else "torch"
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be 'triton', 'torch' or None, got {backend!r}")
    if backend == "triton":
        if not has_triton():
            raise ValueError("backend='triton' needs the triton package; install it, or use backend='torch'")
        if device.type != "cuda" and not load("triton").INTERPRETED:
            raise ValueError(
                f"backend='triton' runs on CUDA tensors, got one on {device}; use backend='torch', or set "
                "TRITON_INTERPRET=1 before the kernels are first used, to run them (slowly) in Triton's interpreter"
            )
    return backend


@cache
def has_triton() -> bool:
    """Whether triton is installed (it exists on Linux only)."""
    return importlib.util.find_spec("triton") is not None


def load(backend: str) -> ModuleType:
    """The module with the row operations of `backend`.

    Imported on first use: Triton decides at import whether its interpreter runs the kernels.
    """
    return importlib.import_module(f"bdpo_kernels.{backend}_rows")
