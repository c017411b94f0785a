"""The choice of the implementation, Triton or PyTorch, and the contract that both implement."""

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
"""An `ignore_index` that equals no label, for calls in which all rows count."""


class PackedRows(Protocol):
    """The operations that the LM head needs on (n, V) rows of logits with (n,) labels, none of which is ignored."""

    def logprobs(self, logits: Tensor, labels: Tensor, transform: LogitTransform) -> Tensor:
        """Return the (n,) log-probabilities of the labels. The logits are not changed."""
        ...

    def logprobs_and_gradient(
        self, logits: Tensor, labels: Tensor, transform: LogitTransform, gradient: Tensor
    ) -> Tensor:
        """Return the (n,) log-probabilities, and write a gradient into (n, V) `gradient`.

        The gradient is that of −log p(label) over `transform.scale`. `gradient` may be the logits themselves.
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
        """Return (B·T,) log-probabilities, 0 at ignored rows, and the statistics for `backward`.

        `backward` needs nothing else besides the logits.
        """
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
        """Return the gradient of Σ token_grads · log p(label) with respect to the raw logits, in a new tensor."""
        ...

    def shard_statistics(self, logits: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """Return, for each of (n, v) rows, the largest exponent, and the logarithm of the sum minus that exponent."""
        ...

    def shard_label(self, logits: Tensor, labels: Tensor, transform: LogitTransform, shift: Tensor) -> Tensor:
        """Return the (n,) exponents of the labels, minus `shift` (n,)."""
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
        """Write the gradient for some of the columns, given the statistics of the whole rows.

        Label −1 matches no column.
        """
        ...

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiply a contiguous `tensor` by the 0-dimensional `factor`; do nothing if the factor is 1."""
        ...

    def sum_by_sequence(self, logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
        """Return (S,) sums of the (N,) `logps`, grouped by `sequence_ids`; in float64, in a fixed order."""
        ...


def resolve_backend(backend: Backend | None, device: torch.device) -> Backend:
    """Return the backend for `device`: the caller's choice, else Triton on CUDA and PyTorch on other devices.

    Raises:
        ValueError: the name is unknown, or Triton cannot run on the device.
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
    """Return whether triton is installed (it exists on Linux only)."""
    return importlib.util.find_spec("triton") is not None


def load(backend: str) -> Rows:
    """Return the row operations of `backend`.

    The module is imported on first use: Triton decides at import whether its interpreter runs the kernels.
    """
    return cast(Rows, importlib.import_module(f"bdpo_kernels.rows.{backend}"))


def _interpreted() -> bool:
    return bool(importlib.import_module("bdpo_kernels.rows.triton").INTERPRETED)
