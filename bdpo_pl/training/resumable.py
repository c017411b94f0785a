"""What makes a run exact to resume and honest about signals, for a Trainer that is built in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L

from bdpo_pl.training.callbacks import LastCheckpoint, RandomState, SaveOnNonFinite
from bdpo_pl.training.checkpoints import StopSignals, find_checkpoint, write_atomically
from bdpo_pl.training.identity import ResumeOptions, RunIdentity
from bdpo_pl.training.metrics_file import MetricsRows, continue_metrics


def resumable(trainer: L.Trainer, ckpt_path: str | Path | None = None, allow: Sequence[str] = ()) -> L.Trainer:
    """Give `trainer` what the command `fit` gives its own, and return it.

    Whole checkpoints, of which `last.ckpt` is written at every validation; the random state in them; signals that
    finish the step, save and stop; the last good state where a loss is not finite; the run's identity, which a resume
    is compared with before anything is scored; and metrics that go on in the folder of the stopped run. A callback
    that the trainer has already stays as it is.

    Args:
        trainer: Trainer before its `fit`.
        ckpt_path: Checkpoint that `fit` will be given, if any.
        allow: Differences to go on in spite of; see `ResumeOptions`.

    Raises:
        InputError: The checkpoint is not whole, or `allow` names what is no difference to stop for.
    """
    checkpoint = None if ckpt_path is None else find_checkpoint(str(ckpt_path), Path(trainer.default_root_dir))
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    identity = RunIdentity(checkpoint, ResumeOptions(list(allow)).allow)
    for callback in (SaveOnNonFinite(), RandomState(), identity, MetricsRows(), LastCheckpoint()):
        if not any(isinstance(given, type(callback)) for given in callbacks):
            callbacks.append(callback)
    if not any(isinstance(given, StopSignals) for given in callbacks):
        # First of all, so that a signal is heard before what others do after the last step.
        callbacks.insert(0, StopSignals())
    # Last of all, so that it can share one file with what the others have written.
    callbacks.sort(key=lambda callback: isinstance(callback, LastCheckpoint))
    write_atomically(trainer)
    continue_metrics(trainer, checkpoint)
    return trainer
