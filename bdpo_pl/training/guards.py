"""Checks of a training step: finite numbers, and the expected first loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from bdpo_pl.errors import InputError, NonFiniteError
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.parallel.state import whole


def require_finite_loss(
    trainer: L.Trainer, loss: Tensor, find_places: Callable[[], Sequence[str]], batch_idx: int
) -> None:
    """Raise an error on every rank if `loss` is not finite on any rank.

    This happens before the backward pass, so the weights are still those of the last good step, and before the batch is
    counted, so the metrics of a resumed run are finite. It waits for the device once.

    Args:
        trainer: Trainer of the run.
        loss: loss of a micro-batch.
        find_places: function that returns file and row of each of its pairs; called only if `loss` is not finite,
            because it waits for the device.
        batch_idx: number of the micro-batch in the epoch.

    Raises:
        NonFiniteError: the loss is NaN or infinite on some rank.
    """
    finite = bool(torch.isfinite(loss.detach()))
    if trainer.strategy.reduce_boolean_decision(finite, all=True):
        return
    places = [] if finite else find_places()
    culprit = f" Its pairs: {'; '.join(places[:8])}{'; …' if len(places) > 8 else ''}." if places else ""
    raise NonFiniteError(
        f"the loss is {loss.item()} in epoch {trainer.current_epoch}, batch {batch_idx} (after {trainer.global_step} "
        f"optimiser steps).{culprit} The weights are those of the last good step. "
        "Lower the learning rate, or use bf16 instead of fp16"
    )


def finite_gradient_norm(trainer: L.Trainer, model: nn.Module) -> Tensor:
    """Compute the norm of all gradients of `model`, and refuse one that is not finite.

    Raises:
        NonFiniteError: the norm is NaN or infinite. Where the loss is scaled no error is raised, because the scaler
            skips the step.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if not scales_the_loss(trainer) and not torch.isfinite(norm):
        raise NonFiniteError(
            f"the gradient's norm is {norm.item()} at optimiser step {trainer.global_step} in epoch "
            f"{trainer.current_epoch}, with a finite loss. The weights are those of the last good step. "
            "Lower the learning rate"
        )
    return norm


def scales_the_loss(trainer: L.Trainer) -> bool:
    """Return true if the loss is scaled, as with 16-mixed: the scaler skips steps that are not finite."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def let_the_scaler_unscale(trainer: L.Trainer) -> None:
    """Have gradients unscaled before their norm is logged and clipped, by fused optimisers too.

    Fused ones would unscale them in their own step, after both. Asked this way they take gradients as they are.
    """
    if scales_the_loss(trainer):
        for optimizer in trainer.optimizers:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def check_first_loss(trainer: L.Trainer, losses: Tensor, expected: float) -> None:
    """Warn if the first loss is not the known value for a policy that equals its reference (ln 2 for DPO).

    Args:
        trainer: Trainer of the run, whose precision determines the tolerance.
        losses: (B,) losses of the first micro-batch.
        expected: known loss of every pair.
    """
    low = str(trainer.precision).startswith(("bf16", "16"))
    error = (losses.detach() - expected).abs().max().item()
    if error > (2e-2 if low else 1e-4) * max(1.0, expected):
        rank_zero_warn(
            f"the first loss is off by {error:.2g} from {expected:.4f}, its value for a policy that equals its "
            "reference: policy and reference are computed differently (dtype, attention, or a stale cache?)"
        )
    else:
        rank_zero_info(f"First loss {losses.detach().mean().item():.6f}: policy and reference agree")


def check_weights(loss: PreferenceLoss, weights: object) -> None:
    """Raise `InputError` if the pairs have weights, and `loss` of a pair depends on the others of its batch."""
    if weights is not None and loss.mixes_pairs:
        raise InputError(
            f"the pairs have weights, and {type(loss).__name__} mixes the pairs of a batch, so no factor of one pair's "
            "loss says how much it counts; take another loss, or leave them out with --data.load.ignore '[weight]'"
        )


def say_unscored(loss: PreferenceLoss, mode: str) -> None:
    """Log that no pair is scored, and which curves are therefore missing, if the loss reads no score."""
    if mode == "none" and not (loss.needs_reference or loss.needs_comprehension):
        rank_zero_info(
            f"{type(loss).__name__} reads no reference, so no pair is scored before training: drift and comprehension "
            "are not logged; to have them, set model.reference_mode to precomputed"
        )
