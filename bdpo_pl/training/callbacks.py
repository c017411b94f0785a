"""Callbacks of a training run that save its state, and one that stops it when it overfits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bdpo_pl.errors import InputError, NonFiniteError
from bdpo_pl.training.checkpoints import before_the_batch, checkpoint_folder, is_amid_accumulation
from bdpo_pl.training.one_file import link, link_best_to_last, written_now
from bdpo_pl.training.safety_probe import _GAP

# A checkpoint with more bytes of weights than the first number is written at most once in as many seconds as the
# second, and at the end.
_LARGE_BYTES, _BETWEEN_LARGE_S = 1 << 27, 300.0


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` at validations, to resume from: at every one, or every five minutes if it is large.

    `ModelCheckpoint(monitor=..., save_last=True)` writes one only when the monitored value has improved. No checkpoint
    contains accumulated gradients, and a resumed run would lose them. If a validation comes in the middle of an
    accumulation, the file is therefore written at the end of the optimiser step.
    """

    NAME = "last"

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(filename=self.NAME, save_top_k=1, monitor=None, enable_version_counter=False)
        self._clock = clock
        self._written_at = 0.0
        self._put_off: str | None = None
        self._is_due = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock: earlier steps are already saved, in the checkpoint from which the run is resumed."""
        self._written_at = self._clock()
        super().on_train_start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file, or wait for the end of the step."""
        self._is_due = is_amid_accumulation(trainer)
        if not self._is_due:
            super().on_validation_end(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Write a postponed file between two optimiser steps."""
        if self._is_due and batch_idx % trainer.accumulate_grad_batches == 0:
            with before_the_batch(trainer):
                self._write_what_waits(trainer)

    def _write_what_waits(self, trainer: L.Trainer) -> None:
        self._is_due = False
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Write the file, or link it to a checkpoint of the whole state that this validation has already written.

        A large file is written at most once in five minutes, even if there are more validations. A stop by a signal and
        the end of training always write it.
        """
        over = trainer.global_step >= trainer.estimated_stepping_batches
        recent = self._clock() - self._written_at < _BETWEEN_LARGE_S and _state_bytes(trainer) > _LARGE_BYTES
        if trainer.strategy.reduce_boolean_decision(recent and not over):
            self._put_off = filepath
            return
        self._written_at, self._put_off = self._clock(), None
        same = next(filter(None, (_just_written(callback, trainer) for callback in trainer.checkpoint_callbacks)), None)
        if same is None or same == Path(filepath) or not link(trainer, same, Path(filepath)):
            super()._save_checkpoint(trainer, filepath)
            return
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a postponed file, and one after a last validation before the last step; share it with the best one."""
        if self._is_due:
            self._write_what_waits(trainer)
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if self._put_off is not None:
            self.write_now(trainer, Path(self._put_off))
        super().on_train_end(trainer, pl_module)
        if (last := written_now(self, trainer)) is not None:
            link_best_to_last(trainer, last)

    def write_now(self, trainer: L.Trainer, path: Path) -> None:
        """Write the file to `path` now; nothing is postponed any longer."""
        self._is_due, self._put_off = False, None
        super()._save_checkpoint(trainer, str(path))


def _state_bytes(trainer: L.Trainer) -> int:
    """Return the bytes of the weights that this process trains; a checkpoint holds three times as many."""
    return sum(p.numel() * p.element_size() for p in trainer.lightning_module.parameters() if p.requires_grad)


def log_interval(steps: int) -> int:
    """Return the number of optimiser steps between two lines of the log, for a run of `steps` optimiser steps.

    It is 5, or less in a short run, whose curves would otherwise have too few points.
    """
    return min(5, max(1, steps // 10))


class LogInterval(L.Callback):
    """Sets the Trainer's `log_every_n_steps` according to the length of the run."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the interval."""
        steps = int(trainer.estimated_stepping_batches)
        trainer.log_every_n_steps = log_interval(steps)  # type: ignore[attr-defined]


def _just_written(callback: L.Callback, trainer: L.Trainer) -> Path | None:
    """Return the checkpoint of the whole state that `callback` wrote at this step, or None."""
    if isinstance(callback, LastCheckpoint) or not isinstance(callback, ModelCheckpoint) or callback.save_weights_only:
        return None
    return written_now(callback, trainer)


class SaveOnNonFinite(L.Callback):
    """Saves the state when a loss or gradient is not finite: the weights are still those of the last good step.

    No checkpoint contains accumulated gradients, so a run that is resumed from it takes the whole failed step again.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write `last-good.ckpt`, and name it in the error. All ranks raise the error, so all of them save."""
        if isinstance(exception, NonFiniteError) and pl_module.trainer.optimizers:
            path = checkpoint_folder(trainer) / "last-good.ckpt"
            with _before_the_step(trainer):
                trainer.save_checkpoint(path)
            rank_zero_info(f"Saved the last good state to {path}")
            # `last` would be the checkpoint of the last validation.
            exception.args = (f"{exception}; then resume with --ckpt_path {path}",)


@contextmanager
def _before_the_step(trainer: L.Trainer) -> Iterator[None]:
    """Set Lightning's counters back to the first batch of the optimiser step that is under way, for a checkpoint."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    kept = vars(copy.deepcopy(progress))
    done = progress.current.processed  # type: ignore[attr-defined]
    first = done - done % trainer.accumulate_grad_batches
    for name, value in vars(progress.current).items():
        # `before_the_batch` counts the last one back.
        late = value - first - (name == "ready")
        setattr(progress.current, name, value - late)
        setattr(progress.total, name, getattr(progress.total, name) - late)
    try:
        with before_the_batch(trainer):
            yield
    finally:
        vars(progress).update(kept)


class RandomState(L.Callback):
    """Saves the random state of every rank in checkpoints, which Lightning does not do."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Collect the states of all ranks' generators. All ranks call this method."""
        state = {"cpu": torch.get_rng_state()}
        # Asked for in a run on the CPU, it would take up the GPU.
        if trainer.strategy.root_device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        checkpoint["random_state"] = {name: _of_all_ranks(trainer, value) for name, value in state.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the state of this rank's generators."""
        state = checkpoint.get("random_state", {})
        ranks = len(state.get("cpu", ()))
        if ranks != trainer.world_size:
            if ranks:
                rank_zero_info(f"The random state is not restored: it was saved on {ranks} ranks")
            return
        torch.set_rng_state(state["cpu"][trainer.global_rank].clone())
        if "cuda" in state and trainer.strategy.root_device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"][trainer.global_rank].clone())


def _of_all_ranks(trainer: L.Trainer, value: Tensor) -> Tensor:
    """Return (W, …), the `value` of each of W ranks."""
    if trainer.world_size == 1:
        return value.unsqueeze(0)
    mine = value.to(trainer.strategy.root_device)
    parts = [torch.empty_like(mine) for _ in range(trainer.world_size)]
    dist.all_gather(parts, mine)
    return torch.stack(parts).cpu()


class StopAtGap(L.Callback):
    """Stops training when the policy overfits: when the gap, training − held-out, exceeds a limit at a validation.

    Args:
        limit: limit of the gap in mean margin, in the unit of the implicit reward.

    Raises:
        InputError: the limit is not above 0, the gap before training.
    """

    def __init__(self, limit: float) -> None:
        if not limit > 0.0:
            raise InputError(f"stop_at_gap must be above 0, the gap before training; got {limit}")
        self.limit = limit

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the gap of this validation, which is the same on every rank, with the limit."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        gap = float(trainer.callback_metrics[_GAP])
        if gap > self.limit:
            trainer.should_stop = True
            rank_zero_info(
                f"Stopping at step {trainer.global_step}: {_GAP} is {gap:.4f}, above stop_at_gap {self.limit}"
            )
