"""Progress of a run: a bar of 80 columns in a terminal, otherwise a line every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from bdpo_pl.console import get_console
from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.data.held_out import HELD_OUT, further_sets
from bdpo_pl.parallel.ranks import data_ranks
from bdpo_pl.reporting.format import percent, plural, seconds, signed, size, whole
from bdpo_pl.reporting.progress import memory_used, say, shows_bars
from bdpo_pl.training.start_warnings import warn_at_start

_MOST_SECONDS = 30.0
"""Maximum seconds between two lines if steps are slow."""
_TRIAL = 2
_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("train/loss", "loss", lambda value: f"{value:.4f}"),
    ("train/margin", "margin", lambda value: signed(value, 3)),
    ("train/accuracy", "accuracy", percent),
)
_COMPUTED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("train/mfu", "MFU", lambda value: percent(value, 0)),
    ("train/padding_share", "padding", lambda value: percent(value, 0)),
)
_VALIDATED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("held_out/loss", "held-out loss", lambda value: f"{value:.4f}"),
    ("held_out/accuracy", "accuracy", percent),
    ("gap/margin", "margin gap", lambda value: signed(value, 3)),
)


class RunProgress(ProgressBar):
    """Shows step, loss, margin, pairs per second, MFU, share of padding, peak memory and remaining time.

    Args:
        clock: function that returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.clock = clock
        self._bar: Progress | None = None
        self._task: Any = None
        self._enabled = True
        self._start = self._last = self._paused = 0.0
        self._pairs: int | Tensor = 0
        self._batches = 0
        self._first_step = self._said_step = 0
        self._due: int | None = None

    def disable(self) -> None:
        """Stop showing anything, on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock and the bar."""
        self._start = self._last = self.clock()
        self._paused, self._pairs, self._batches = 0.0, 0, 0
        self._first_step = self._said_step = trainer.global_step
        if self._enabled:
            warn_at_start(trainer)
        if self._enabled and shows_bars():
            columns = (TextColumn("{task.description}"), BarColumn(14), TextColumn("{task.fields[said]}"))
            self._bar = Progress(*columns, console=get_console())
            self._bar.start()
            self._task = self._bar.add_task("", total=_total(trainer), completed=trainer.global_step, said="")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """Count the batch, and decide whether a line is due."""
        # Added up on the device, so that a batch does not wait for it.
        self._pairs = self._pairs + (batch.pair_weight > 0).sum()
        self._batches += 1
        now, step = self.clock(), trainer.global_step
        if not self._enabled:
            return
        if self._batches == _TRIAL:
            left = _batches_of(trainer) - _TRIAL
            if left > 0:
                expected = (now - self._start) / _TRIAL * (left + _TRIAL)
                self._write(f"Training: about {seconds(expected)} for {_steps(_total(trainer))}, validations aside")
        done = step >= _total(trainer)
        at_log = step % max(1, trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        if step == self._said_step or not (at_log or done or now - self._last >= _MOST_SECONDS):
            return
        self._said_step, self._last = step, now
        # The line is shown later, because the module logs the step's metrics after its callbacks.
        self._due = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Show the line of the previous step if it is due."""
        self._say_step(trainer)

    def _say_step(self, trainer: L.Trainer) -> None:
        if self._due is None:
            return
        step, self._due = self._due, None
        values = _told(trainer.callback_metrics, _SHOWN)
        taken = max(self._last - self._start - self._paused, 1e-9)
        left_steps = (_total(trainer) - step) / max(1, step - self._first_step) * taken
        left = "" if step >= _total(trainer) else f"{seconds(left_steps)} left"
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=f"step {step:,}/{_total(trainer):,}",
                completed=step,
                said=" ".join(filter(None, [*values[:2], *_told(trainer.callback_metrics, _COMPUTED[:1]), left])),
            )
            return
        # Counted here alone; the other ranks take as many.
        pairs = int(self._pairs) * data_ranks(trainer)[1]
        rest = [f"{pairs / taken:.3g} pairs/s", *_told(trainer.callback_metrics, _COMPUTED), size(memory_used())]
        self._write(", ".join(filter(None, [f"step {step:,} of {_total(trainer):,}", *values, *rest, left])))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exclude the time of validations from the rate."""
        self._say_step(trainer)
        self._validation_start = self.clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the results of the validation."""
        self._paused += self.clock() - self._validation_start
        metrics = trainer.callback_metrics
        values = _told(metrics, _VALIDATED)
        others = further_sets(metrics, getattr(pl_module, "monitored", ""))
        values += _told(metrics, tuple((f"{HELD_OUT}/{n}/loss", f"{n} loss", lambda x: f"{x:.4f}") for n in others))
        if self._enabled and values and not trainer.sanity_checking:
            self._write(f"after step {trainer.global_step:,}: {', '.join(values)}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the line of the last step if it is due."""
        self._say_step(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar."""
        self._say_step(trainer)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bar."""
        self._stop()

    def print(self, *args: object, sep: str = " ", **kwargs: object) -> None:
        """Print above the bar."""
        self._write(sep.join(map(str, args)))

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            say(line)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _steps(number: int) -> str:
    return f"{whole(number)} {plural(number, 'optimiser step')}"


def _total(trainer: L.Trainer) -> int:
    """Return the number of optimiser steps in the whole run, whether epochs or steps limit it."""
    return int(trainer.estimated_stepping_batches)


def _batches_of(trainer: L.Trainer) -> int:
    """Return the number of micro-batches in the whole run."""
    return _total(trainer) * trainer.accumulate_grad_batches


def _told(metrics: Mapping[str, Any], shown: tuple[tuple[str, str, Callable[[float], str]], ...]) -> list[str]:
    return [f"{label} {form(float(metrics[name]))}" for name, label, form in shown if name in metrics]
