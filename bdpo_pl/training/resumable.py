"""Exact resume and clean stops by signals for a Trainer that is built in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L

from bdpo_pl.training.best_checkpoint import KeepsBest
from bdpo_pl.training.callbacks import LastCheckpoint, RandomState, SaveOnNonFinite
from bdpo_pl.training.checkpoints import StopSignals, find_checkpoint, write_atomically
from bdpo_pl.training.identity import ResumeOptions, RunIdentity
from bdpo_pl.training.metrics_file import MetricsRows, continue_metrics


def resumable(trainer: L.Trainer, ckpt_path: str | Path | None = None, allow: Sequence[str] = ()) -> L.Trainer:
    """Add to `trainer` the callbacks that the command `fit` adds to its own, and return it.

    - Checkpoints are complete or absent, include the random state, and `last.ckpt` is written at validations.
    - A signal lets the step finish; the run then saves and stops.
    - If a loss is not finite, the last good state is saved.
    - A resumed run is compared with the original one before anything is scored.
    - The best checkpoint before the stop stays the best until a validation is better.
    - The metrics of a resumed run continue in the folder of the stopped one.

    Callbacks that the trainer has already are kept as they are.

    Args:
        trainer: Trainer before its `fit`.
        ckpt_path: checkpoint that will be passed to `fit`, if any.
        allow: allowed differences from the original run; see `ResumeOptions`.

    Raises:
        InputError: the checkpoint is not whole, or a name in `allow` is unknown.
    """
    checkpoint = None if ckpt_path is None else find_checkpoint(str(ckpt_path), Path(trainer.default_root_dir))
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    identity = RunIdentity(checkpoint, ResumeOptions(list(allow)).allow)
    for callback in (SaveOnNonFinite(), RandomState(), identity, KeepsBest(), MetricsRows(), LastCheckpoint()):
        if not any(isinstance(given, type(callback)) for given in callbacks):
            callbacks.append(callback)
    if not any(isinstance(given, StopSignals) for given in callbacks):
        # First, so that a signal is handled before other callbacks work after the last step.
        callbacks.insert(0, StopSignals())
    # Last, so that it can link its file to a checkpoint that another callback has written.
    callbacks.sort(key=lambda callback: isinstance(callback, LastCheckpoint))
    write_atomically(trainer)
    continue_metrics(trainer, checkpoint)
    return trainer
