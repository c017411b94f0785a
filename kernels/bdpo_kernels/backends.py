"""Which implementation runs, Triton or PyTorch, and the contract that both keep."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from bdpo_kernels.transform import LogitTransform

Backend = Literal["triton", "torch"]

NONE_IGNORED = -(1 << 62)
"""An `ignore_index` that equals no label: for rows that all count."""


class PackedRows(Protocol):
    """What the LM head needs of its rows of logits: (n, V) with labels (n,), none of them ignored."""

    def logprobs(self, logits: Tensor, labels: Tensor, transform: LogitTransform) -> Tensor:
        """(n,) log-probabilities of the labels. The logits stay as they are."""
        ...

    def logprobs_and_gradient(
        self, logits: Tensor, labels: Tensor, transform: LogitTransform, gradient: Tensor
    ) -> Tensor:
        """The same, with the gradient of −log p(label) over `transform.scale` written to (n, V) `gradient`.

        `gradient` may lie over the logits, each row at the start of its own, and be half as wide.
        """
        ...


class Rows(PackedRows, Protocol):
    """All operations of a backend. Rows are (B, T, V) with labels (B, T); packed input has B = 1.

    Attributes:
        LOG_OF_BASE: natural logarithm of the base of the exponentials in a shard's statistics.
    """

    LOG_OF_BASE: float

    def forward(
        self, logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform = ...
    ) -> tuple[Tensor, Tensor]:
        """(B·T,) log-probabilities, 0 at ignored rows, and what `backward` needs besides the logits."""
        ...

    def backward(
        self,
        logits: Tensor,
        labels: Tensor,
        token_grads: Tensor,
        stats: Tensor,
        ignore_index: int,
        transform: LogitTransform = ...,
    ) -> Tensor:
        """Gradient of Σ token_grads · log p(label) with respect to the raw logits, in a new tensor."""
        ...

    def shard_statistics(self, logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """Of each of (n, v) rows: its largest exponent, and the logarithm of the sum less that."""
        ...

    def shard_label(self, logits: Tensor, labels: Tensor, transform: LogitTransform, shift: Tensor) -> Tensor:
        """(n,) exponents of the labels, less `shift` (n,)."""
        ...

    def shard_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        transform: LogitTransform,
        shift: Tensor,
        log_sum: Tensor,
        gradient: Tensor,
    ) -> None:
        """The gradient for a part of the columns, given the statistics of all; label −1 equals no column."""
        ...

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiply a contiguous `tensor` by the 0-dimensional `factor`, and leave it alone if that is 1."""
        ...

    def sum_by_sequence(self, logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
        """(S,) sums of the (N,) `logps` by each token's index of its sequence; in float64, in a fixed order."""
        ...


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
        if device.type != "cuda" and not _interpreted():
            raise ValueError(
                f"backend='triton' runs on CUDA tensors, got one on {device}; use backend='torch', or set "
                "TRITON_INTERPRET=1 before the kernels are first used, to run them (slowly) in Triton's interpreter"
            )
    return backend


@cache
def has_triton() -> bool:
    """Whether triton is installed (it exists on Linux only)."""
    return importlib.util.find_spec("triton") is not None


def load(backend: str) -> Rows:
    """The row operations of `backend`.

    Imported on first use: Triton decides at import whether its interpreter runs the kernels.
    """
    return cast(Rows, importlib.import_module(f"bdpo_kernels.rows.{backend}"))


def _interpreted() -> bool:
    return bool(importlib.import_module("bdpo_kernels.rows.triton").INTERPRETED)
