"""Warnings before the first step, of runs that will not do what their author expects."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from bdpo_pl.losses.balanced_dpo import EXTREME_RATIO, weight_ratios
from bdpo_pl.reporting.format import plural, ratio, whole
from bdpo_pl.scoring.scores import table_scores
from bdpo_pl.training.module import PreferenceModule

_FEW_STEPS = 10


def warn_at_start(trainer: L.Trainer) -> None:
    """Warn of few optimiser steps or fewer than asked for, of idle validations, and of extreme balance weights."""
    _warn_of_few_steps(trainer)
    _warn_of_fewer_steps(trainer)
    _warn_of_idle_validations(trainer)
    _warn_of_extreme_weights(trainer.lightning_module)


def _warn_of_few_steps(trainer: L.Trainer) -> None:
    """Warn of a run that ends before it could learn, unless its number of steps was requested."""
    steps = int(trainer.estimated_stepping_batches)
    if steps < _FEW_STEPS and trainer.max_steps == -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        batches = trainer.accumulate_grad_batches
        each, option = (
            ("", "") if batches == 1 else (f" of {batches} batches each", "trainer.accumulate_grad_batches or ")
        )
        rank_zero_warn(
            f"the data make only {whole(steps)} {plural(steps, 'optimiser step')}{each}; lower {option}"
            "data.batch_size, or raise trainer.max_epochs"
        )


def _warn_of_fewer_steps(trainer: L.Trainer) -> None:
    """Warn of a run whose epochs end it before steps that were asked for, or before the first line of the log."""
    steps = int(trainer.estimated_stepping_batches)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for option, asked in (("max_steps", trainer.max_steps), ("min_steps", trainer.min_steps or 0)):
        if asked > steps:
            rank_zero_warn(
                f"trainer.{option} is {whole(asked)}, but trainer.max_epochs {trainer.max_epochs} ends the run after "
                f"{whole(steps)}: raise trainer.max_epochs, or set it to -1 and let trainer.max_steps end the run"
            )
    every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
    if trainer.loggers and every > steps:
        rank_zero_warn(
            f"trainer.log_every_n_steps is {whole(every)}, but the run has {whole(steps)} "
            f"{plural(steps, 'step')}, so nothing of training is logged: lower it"
        )


class WarnsAtStart(L.Callback):
    """Warns before the first step where no `RunProgress` does."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn, on the first rank."""
        if trainer.is_global_zero:
            warn_at_start(trainer)


def _warn_of_idle_validations(trainer: L.Trainer) -> None:
    """Warn if there are more validations than optimiser steps: each measures the weights of the one before."""
    every, step = trainer.val_check_batch, trainer.accumulate_grad_batches
    if trainer.enable_validation and isinstance(every, int) and every < min(step, int(trainer.num_training_batches)):
        batches = "batch" if every == 1 else f"{whole(every)} batches"
        rank_zero_warn(
            f"a validation follows every {batches}, but an optimiser step only every {whole(step)}: most validations "
            "measure the same weights again. Raise trainer.val_check_interval, or lower trainer.accumulate_grad_batches"
        )


def _warn_of_extreme_weights(module: L.LightningModule) -> None:
    """Warn if balance weights leave one response of many training pairs nearly untrained."""
    if not isinstance(module, PreferenceModule) or not module.loss.needs_comprehension:
        return
    if module.reference is None or module.reference_mode != "precomputed":
        return
    table = module.splits.tables["train"]
    scores = table_scores(table, module.reference.scores("train", torch.arange(len(table))))
    if (weights := module.loss.weights(scores)) is None:
        return
    ratios = weight_ratios(torch.stack((weights.chosen, weights.rejected)).double().numpy())
    median, high = np.quantile(ratios, (0.5, 0.95), method="lower")
    if median > EXTREME_RATIO:
        rank_zero_warn(
            f"in half of the training pairs one response gets more than {ratio(median)} times the weight of the other, "
            f"in 5 % of them more than {ratio(high)} times, and the other is hardly trained; give "
            "model.loss.tau a larger number, or set model.loss.max_weight_ratio. `diagnose` shows what each τ makes of "
            "these pairs"
        )
