"""The losses of a batch: the known scores of its pairs, and two ways to compute the losses.

Shapes: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.data.packing import SequenceBatch, parts_of
from bdpo_pl.forward.fused_loss import fused_preference_loss
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.losses import PairScores, PreferenceLoss
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.scoring.scores import SplitScores

Losses = tuple[Tensor, Tensor, Tensor]
"""The policy's log-probabilities (2, B), the pairs' losses (B,), and the weighted sum of these."""

Read = Callable[[CausalLM, SequenceBatch], Tensor]
"""Function that returns a model's (S,) log-probabilities of the responses of a batch."""


def pair_scores(batch: PreferenceBatch, scores: SplitScores, latest: Tensor | None) -> PairScores:
    """Collect lengths and known scores of the pairs in `batch`.

    Args:
        batch: batch of B pairs.
        scores: scores by the reference.
        latest: (2, B) comprehension measured on the policy, used instead of the reference's; None: not measured.
    """
    comprehension = scores.comprehension if latest is None else latest
    nothing = (None, None)
    known = PairScores(
        *batch.lengths,
        *(scores.reference if scores.reference is not None else nothing),
        *(comprehension if comprehension is not None else nothing),
        *(batch.safe if batch.safe is not None else nothing),
    )
    return replace(known, counted=batch.pair_weight > 0, desirable=batch.desirable)


def policy_logps(policy: CausalLM, loss: PreferenceLoss, batch: PreferenceBatch, read: Read = response_logps) -> Tensor:
    """Compute the policy's (2, B) log-probabilities, with tokens weighted as `loss` requires."""
    if loss.tail_weight is None:
        return read(policy, batch.sequences).view(2, -1)
    shorter = batch.lengths.min(dim=0).values.repeat(2)
    first, rest = read(policy, parts_of(batch.sequences, shorter)).view(2, 2, -1)
    return first + loss.tail_weight * rest


def plain_losses(
    policy: CausalLM, loss: PreferenceLoss, batch: PreferenceBatch, scores: PairScores, read: Read = response_logps
) -> Losses:
    """Compute the losses from log-probabilities with gradients, which `read` returns."""
    logps = policy_logps(policy, loss, batch, read)
    losses = loss(logps[0], logps[1], scores)
    return logps, losses, (losses * batch.loss_weight).sum()


def fused_losses(policy: CausalLM, loss: PreferenceLoss, batch: PreferenceBatch, scores: PairScores) -> Losses:
    """Compute the same, but with gradients of the sum only, which are computed with it, a few pairs at a time."""

    weight, known = batch.loss_weight, scores

    def loss_of_pairs(chosen: Tensor, rejected: Tensor, index: Tensor) -> Tensor:
        return loss(chosen, rejected, known[index]) * weight[index]

    def take_drift(rejected: Tensor) -> None:
        nonlocal known
        known = replace(scores, drift=loss.drift(rejected, scores))

    first = take_drift if loss.reads_drift else None
    total, logps = fused_preference_loss(policy, batch.sequences, loss_of_pairs, first)
    with torch.no_grad():
        return logps, loss(logps[0], logps[1], scores), total
