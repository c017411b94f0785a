"""Warnings before the first step, of runs that will not do what their author expects."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from bdpo_pl.reporting.format import plural, whole

_FEW_STEPS = 10


def warn_at_start(trainer: L.Trainer) -> None:
    """Warn of a run of few optimiser steps, and of validations between which nothing is trained."""
    _warn_of_few_steps(trainer)
    _warn_of_idle_validations(trainer)


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


def _warn_of_idle_validations(trainer: L.Trainer) -> None:
    """Warn if there are more validations than optimiser steps: each measures the weights of the one before."""
    every, step = trainer.val_check_batch, trainer.accumulate_grad_batches
    if trainer.enable_validation and isinstance(every, int) and every < min(step, int(trainer.num_training_batches)):
        batches = "batch" if every == 1 else f"{whole(every)} batches"
        rank_zero_warn(
            f"a validation follows every {batches}, but an optimiser step only every {whole(step)}: most validations "
            "measure the same weights again. Raise trainer.val_check_interval, or lower trainer.accumulate_grad_batches"
        )
