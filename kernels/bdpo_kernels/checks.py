"""Argument checks, so that a wrong argument is a Python error that names it and never a wrong number."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)


def check_sequence_arguments(
    logits: Tensor, labels: Tensor, sequence_ids: Tensor | None, num_sequences: int | None
) -> None:
    """Types, dtypes, shapes and devices of `sequence_logprob`'s tensors."""
    _check_tensor("logits", logits, FLOAT_DTYPES)
    _check_tensor("labels", labels, (torch.int64,))
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must be (N, V) or (B, T, V), got shape {tuple(logits.shape)}")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has an empty vocabulary: shape {tuple(logits.shape)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}; "
            f"got {tuple(labels.shape)}"
        )
    _check_device("labels", labels, logits)
    if logits.dim() == 3:
        if sequence_ids is not None or num_sequences is not None:
            raise ValueError(
                "sequence_ids and num_sequences belong to packed (N, V) logits; rows are the sequences of padded ones"
            )
        return
    if sequence_ids is None or num_sequences is None:
        raise ValueError("packed (N, V) logits need sequence_ids (N,) and num_sequences")
    _check_tensor("sequence_ids", sequence_ids, INDEX_DTYPES)
    if sequence_ids.shape != labels.shape:
        raise ValueError(f"sequence_ids must be (N,) = {tuple(labels.shape)}, got {tuple(sequence_ids.shape)}")
    _check_device("sequence_ids", sequence_ids, logits)
    if not isinstance(num_sequences, int) or isinstance(num_sequences, bool):
        raise TypeError(f"num_sequences must be an int, got {type(num_sequences).__name__}")
    if num_sequences < 1:
        raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")


def check_range(name: str, values: Tensor, limit: int, ignored: int | None = None) -> None:
    """Every value in [0, limit), or equal to `ignored`."""
    wrong = (values < 0) | (values >= limit)
    if ignored is not None:
        wrong &= values != ignored
    if bool(wrong.any()):
        allowed = f"[0, {limit})" + ("" if ignored is None else f", or {ignored} to be ignored")
        first = int(wrong.flatten().nonzero()[0])
        raise ValueError(f"{name} must be in {allowed}; got {int(values.flatten()[first])} at flat index {first}")


def check_overwritable(logits: Tensor) -> None:
    """Whether a gradient may be written over `logits`."""
    # unsqueeze(0) of a leaf is a view of it.
    base = logits._base if logits._base is not None else logits
    if base.is_leaf:
        raise ValueError(
            "inplace_backward would overwrite logits that are a leaf, the caller's own tensor; turn it off"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError("inplace_backward cannot write to expanded logits, whose rows share memory; turn it off")


def choose_backend(backend: str | None, logits: Tensor) -> Literal["triton", "torch"]:
    """The backend to run, checked to be able to."""
    if backend not in (None, "triton", "torch"):
        raise ValueError(f"backend must be 'triton', 'torch' or None, got {backend!r}")
    if backend == "torch" or (backend is None and logits.device.type != "cuda"):
        return "torch"
    if importlib.util.find_spec("triton") is None:
        if backend is None:
            return "torch"
        raise ValueError("backend='triton': triton is not installed here; use backend='torch'")
    if logits.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs CUDA tensors, and logits are on {logits.device}; use backend='torch', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    return "triton"


def _check_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(value.dtype).removeprefix('torch.')}")


def _check_device(name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device} and logits on {logits.device}; move one of them")
