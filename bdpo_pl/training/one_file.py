"""One file for two checkpoints that hold the same weights: a hard link takes no space on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


def link(trainer: L.Trainer, file: Path, name: Path) -> bool:
    """Link `name` to `file` atomically; return false if the file system has no links. All ranks call this function."""
    done = False
    if trainer.is_global_zero and file.is_file():
        partial = name.with_name(f".{name.name}.link")
        try:
            partial.unlink(missing_ok=True)
            os.link(file, partial)
            partial.replace(name)
            done = True
        except OSError:
            # Some file systems have no links.
            partial.unlink(missing_ok=True)
    return trainer.strategy.reduce_boolean_decision(done, all=False)


def written_now(callback: ModelCheckpoint, trainer: L.Trainer) -> Path | None:
    """Return the checkpoint that `callback` has written at this optimiser step, or None."""
    written = callback._last_checkpoint_saved
    return Path(written) if written and callback._last_global_step_saved == trainer.global_step else None


def link_best_to_last(trainer: L.Trainer, last: Path) -> None:
    """Replace best checkpoints of weights alone that hold the weights of `last` by links to it. All ranks call this.

    The best checkpoint is often that of the last step, and then its weights would be on the disk twice. Its name then
    leads to the whole state; who reads weights finds the same ones.

    Args:
        trainer: Trainer with its checkpoint callbacks, after the last step.
        last: checkpoint of the whole state at the last step.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or not callback.save_weights_only:
            continue
        if (best := written_now(callback, trainer)) is not None:
            same = trainer.is_global_zero and _same_weights(best, last)
            if trainer.strategy.reduce_boolean_decision(same, all=False):
                link(trainer, last, best)


def _same_weights(one: Path, other: Path) -> bool:
    if not one.is_file() or not other.is_file():
        return False
    weights, others = (
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"] for path in (one, other)
    )
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
