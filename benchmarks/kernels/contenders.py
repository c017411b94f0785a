"""Ours and the peers, each a function from a problem to its loss, with the settings that its documentation recommends.

`linear` contenders start from hidden states, `logits` contenders from existing logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_kernels import linear_preference_loss, linear_sequence_logprob, sequence_logprob
from benchmarks.kernels.problem import BETA, Problem, pair_losses

LinearContender = Callable[[Problem], Tensor]
LogitsContender = Callable[[Problem, Tensor], Tensor]


class NotRunError(RuntimeError):
    """A contender that cannot run here, with the reason."""


def ours_fused_loss(p: Problem, exact: bool = True) -> Tensor:
    """Compute the loss by bdpo_kernels.linear_preference_loss."""
    B = p.num_pairs
    loss, _, _ = linear_preference_loss(
        p.hidden, p.weight, p.labels, p.sequence_ids, pair_losses, num_pairs=B, softcap=p.shape.softcap,
        check_labels=False, exact=exact,
    )  # fmt: skip
    return loss / B


def ours_rounded(p: Problem) -> Tensor:
    """Compute the same from logits that are rounded to half precision."""
    if p.shape.dtype == torch.float32:
        raise NotRunError("float32 logits are not rounded")
    return ours_fused_loss(p, exact=False)


def ours_linear_logprob(p: Problem) -> Tensor:
    """Compute the loss by bdpo_kernels.linear_sequence_logprob."""
    return p.mean_loss(
        linear_sequence_logprob(
            p.hidden, p.weight, p.labels, p.sequence_ids, 2 * p.num_pairs, softcap=p.shape.softcap, check_labels=False
        )
    )


def _logits(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    cap = p.shape.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def naive(p: Problem) -> Tensor:
    """Compute the loss by log_softmax and gather in float32."""
    logps = _logits(p, p.hidden, p.weight).float().log_softmax(-1).gather(1, p.labels[:, None]).squeeze(1)
    return p.mean_loss(p.sums(logps))


def naive_compiled(p: Problem) -> Tensor:
    """Compute the naive loss under torch.compile."""
    return torch.compile(naive)(p)


def trl_selective(p: Problem) -> Tensor:
    """Compute the loss by TRL's selective_log_softmax on full logits."""
    from trl.trainer.utils import selective_log_softmax

    return p.mean_loss(p.sums(selective_log_softmax(_logits(p, p.hidden, p.weight), p.labels)))


def trl_chunked(p: Problem) -> Tensor:
    """Compute the loss by TRL's ChunkedLogProbFunction, with TRL's own chunk size."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.labels, 1.0, 32_768, p.shape.softcap, 1.0, ())
    return p.mean_loss(p.sums(outputs[0]))


def liger_dpo(p: Problem) -> Tensor:
    """Compute the loss by Liger's LigerFusedLinearDPOLoss with its defaults: compiled, one pair per chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    if p.shape.softcap is not None:
        raise NotRunError("it has no soft-cap")
    T, D = p.shape.T, p.shape.D
    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    result = loss(p.weight, p.hidden.view(-1, T, D), p.labels.view(-1, T))
    return result[0] if isinstance(result, tuple) else result


def cut_cross_entropy(p: Problem) -> Tensor:
    """Compute the loss by Apple's cut-cross-entropy per token; without a GPU, by compiled PyTorch, as it advises."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if p.hidden.is_cuda else "torch_compile"
    nll = linear_cross_entropy(p.hidden, p.weight, p.labels, softcap=p.shape.softcap, reduction="none", impl=impl)
    return p.mean_loss(p.sums(-nll))


def liger_cross_entropy(p: Problem) -> Tensor:
    """Run Liger's LigerFusedLinearCrossEntropyLoss: not a preference loss, only the same products."""
    if not p.hidden.is_cuda:
        raise NotRunError("its Triton kernel needs a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(softcap=p.shape.softcap)(p.weight, p.hidden, p.labels)


def torch_linear_cross_entropy(p: Problem) -> Tensor:
    """Run PyTorch's F.linear_cross_entropy with its default chunks: not a preference loss, only the same products."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotRunError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    if p.shape.softcap is not None:
        raise NotRunError("it has no soft-cap")
    return F.linear_cross_entropy(p.hidden, p.weight, p.labels, options=torch.nn.LinearCrossEntropyOptions())


def liger_cute(p: Problem) -> Tensor:
    """Run Liger's cross-entropy by its CuTe kernels for Hopper: not a preference loss, only the same products."""
    if not p.hidden.is_cuda or torch.cuda.get_device_capability() < (9, 0):
        raise NotRunError("its CuTe kernels need a Hopper GPU or newer")
    if find_spec("cutlass") is None:
        raise NotRunError("its CuTe kernels need the package nvidia-cutlass-dsl")
    # Read when Liger is first imported: this process belongs to this contender alone.
    os.environ["LIGER_KERNEL_IMPL"] = "cutedsl"
    return liger_cross_entropy(p)


def quack_linear(p: Problem) -> Tensor:
    """Run QuACK's chunked linear cross-entropy: not a preference loss, only the same products."""
    if not p.hidden.is_cuda or torch.cuda.get_device_capability() < (9, 0):
        raise NotRunError("it needs a Hopper GPU or newer")
    if p.shape.softcap is not None:
        raise NotRunError("it has no soft-cap")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(p.hidden, p.weight, p.labels)


def logits_ours(p: Problem, logits: Tensor) -> Tensor:
    """Compute log-probabilities by bdpo_kernels.sequence_logprob."""
    return sequence_logprob(logits, p.labels, p.sequence_ids, 2 * p.num_pairs, check_labels=False).sum()


def logits_naive(p: Problem, logits: Tensor) -> Tensor:
    """Compute log-probabilities by log_softmax and gather in float32."""
    return logits.float().log_softmax(-1).gather(1, p.labels[:, None]).sum()


def logits_naive_compiled(p: Problem, logits: Tensor) -> Tensor:
    """Compute the naive log-probabilities under torch.compile."""
    return torch.compile(logits_naive)(p, logits)


def logits_trl_selective(p: Problem, logits: Tensor) -> Tensor:
    """Compute log-probabilities by TRL's selective_log_softmax."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, p.labels).sum()


def logits_quack(p: Problem, logits: Tensor) -> Tensor:
    """Compute log-probabilities by QuACK's cross_entropy."""
    if not logits.is_cuda:
        raise NotRunError("it needs a GPU")
    from quack import cross_entropy

    return -cross_entropy(logits, p.labels).sum()


LINEAR: dict[str, LinearContender] = {
    "naive": naive,
    "ours, fused loss": ours_fused_loss,
    "ours, exact=False": ours_rounded,
    "ours, linear logprob": ours_linear_logprob,
    "naive, compiled": naive_compiled,
    "TRL selective_log_softmax": trl_selective,
    "TRL ChunkedLogProbFunction": trl_chunked,
    "Liger fused linear DPO": liger_dpo,
    "cut-cross-entropy": cut_cross_entropy,
    "Liger fused linear CE": liger_cross_entropy,
    "Liger fused linear CE, CuTe": liger_cute,
    "QuACK linear CE": quack_linear,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
}
LOGITS: dict[str, LogitsContender] = {
    "naive": logits_naive,
    "ours": logits_ours,
    "naive, compiled": logits_naive_compiled,
    "TRL selective_log_softmax": logits_trl_selective,
    "QuACK cross_entropy": logits_quack,
}
OTHER_LOSS = frozenset(
    {"Liger fused linear CE", "Liger fused linear CE, CuTe", "QuACK linear CE", "torch linear_cross_entropy"}
)
"""Contenders with a different loss, whose numbers cannot agree with the rest."""

_PACKAGES = {"TRL": "trl", "Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "QuACK": "quack"}


def missing_package(contender: str) -> str | None:
    """Return the package that `contender` needs and that is not installed; None if nothing is missing."""
    package = next((package for name, package in _PACKAGES.items() if contender.startswith(name)), None)
    return package if package is not None and find_spec(package) is None else None
