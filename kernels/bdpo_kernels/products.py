"""The three matrix products of an LM head, in the precision that each needs.

Products of half-precision numbers are exact in float32, so their sums are kept in float32 where precision matters: for
the logits, whose rounding to bfloat16 would change a response's log-probability by tenths of a nat, and for gradients
that several chunks contribute to. GPUs do this in one step (`out_dtype`). Most CPUs have no fast half-precision
product, so there float32 copies of one slab of the vocabulary at a time are multiplied. On those that have one (AMX),
the products whose result is in half precision use it. AVX512-BF16 alone is none: there oneDNN's products were slower
than those of float32 copies (`kernels/README.md`).

Shapes: n tokens; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Bytes of the slabs in which a product is computed if it takes more than one step.
_SLAB_BYTES = 1 << 26


def write_logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Compute out (n, V) = hidden (n, D) @ weight (V, D)ᵀ + bias (V,) in the dtype of `out`.

    The products are summed in float32 or wider and rounded once; a half-precision sum with a bias may round once more.
    """
    if out.dtype == hidden.dtype and not _by_slabs(hidden):
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        return
    if out.is_cuda and has_wide_products(out.device):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.float()
        for rows in _slabs(weight):
            if out.dtype == wide.dtype:
                torch.mm(wide, weight[rows].float().t(), out=out[:, rows])
            else:
                out[:, rows] = torch.mm(wide, weight[rows].float().t())
    if bias is not None:
        out += bias


def hidden_product(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the (n, D) product gradient (n, V) @ weight (V, D), summed in float32 or wider."""
    if not _by_slabs(weight):
        return torch.mm(gradient, weight)
    total = gradient.new_zeros(len(gradient), weight.shape[1], dtype=torch.float32)
    for rows in _slabs(weight):
        total.addmm_(gradient[:, rows].float(), weight[rows].float())
    return total


def add_weight_product(total: Tensor, gradient: Tensor, hidden: Tensor, add: bool) -> None:
    """Compute total (V, D) (+)= gradient (n, V)ᵀ @ hidden (n, D), summed in float32 or wider.

    Without `add`, the previous values of `total` are not read. With it, `total` is float32 or float64: each addition
    rounds.
    """
    left, beta = gradient.t(), float(add)
    if total.dtype == left.dtype == hidden.dtype and not _by_slabs(total):
        total.addmm_(left, hidden, beta=beta)
    elif total.is_cuda and has_wide_products(total.device):
        torch.addmm(total, left, hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        if not total.is_cuda:
            hidden = hidden.float()
        for rows in _slabs(total):
            product = torch.mm(left[rows].to(hidden.dtype), hidden)
            if add:
                total[rows] += product
            else:
                total[rows] = product


def weighted_sum(gradient: Tensor, weights: Tensor) -> Tensor:
    """Return the (V,) sum over n of weights (n,) · gradient (n, V), in the dtype of `weights`."""
    if gradient.dtype == weights.dtype:
        return torch.mv(gradient.t(), weights)
    n, V = gradient.shape
    size = max(1, _SLAB_BYTES // max(1, n * weights.element_size()))
    parts = [torch.mv(gradient[:, v : v + size].to(weights.dtype).t(), weights) for v in range(0, V, size)]
    return torch.cat(parts)


@cache
def has_wide_products(device: torch.device) -> bool:
    """Return whether this PyTorch multiplies bfloat16 into float32 in one step, padded rows included.

    The answer varies by build, so the products are tried.
    """
    half = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.ones(16, 32, dtype=torch.float32, device=device)
    try:
        torch.mm(half, half[:15].t(), out_dtype=torch.float32, out=total[:, :15])
        torch.addmm(total[:, :16], half, half, out_dtype=torch.float32, beta=1.0, out=total[:, :16])
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total[:, :15] == 32).all()) and bool((total[:, 15] == 17).all()) and bool((total[:, 16:] == 1).all())


# Names of CPU instructions for half-precision products that are summed in float32.
_CPU_PRODUCTS = {torch.bfloat16: ("amx_bf16",), torch.float16: ("amx_fp16",)}
# oneDNN has the products. PyTorch 2.11 does not report what a CPU supports. This is read at import, because
# torch.compile cannot read it.
_TELLS = hasattr(torch.cpu, "get_capabilities") and torch.backends.mkldnn.is_available()
_CPU_CAPABILITIES: dict[str, Any] = dict(torch.cpu.get_capabilities()) if _TELLS else {}


def has_fast_half(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of `dtype` (bfloat16 or float16) faster than their float32 copies."""
    return any(_CPU_CAPABILITIES.get(name, False) for name in _CPU_PRODUCTS.get(dtype, ()))


def _by_slabs(tensor: Tensor) -> bool:
    """Return whether products with `tensor` need float32 copies: half precision, but on a GPU or a CPU that has it."""
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    return is_half and not tensor.is_cuda and not has_fast_half(tensor.dtype)


def _slabs(matrix: Tensor) -> Iterator[slice]:
    """Return the ranges of rows of a (V, D) matrix whose float32 copies fill a slab."""
    V, D = matrix.shape
    size = max(1, _SLAB_BYTES // max(1, D * 4))
    return (slice(start, start + size) for start in range(0, V, size))
