"""Checkpoints that are written completely or not at all, the search for the newest one, and stops by a signal."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bdpo_pl.errors import InputError, MachineError, StoppedError, first_line
from bdpo_pl.files import write_whole
from bdpo_pl.parallel.saved_parts import META, before, is_whole_folder

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, flushes it to the disk and only then renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write `checkpoint` to the file `path`, completely or not at all; to a remote path as Lightning does.

        Raises:
            MachineError: the disk is full, or the folder cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: torch.save(checkpoint, file))
        # If the disk is full, torch's writer may raise its own error instead of the operating system's.
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            raise MachineError(
                f"the checkpoint {path} cannot be written ({reason}); the one before it is untouched. Free space, then "
                "resume with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Load the checkpoint at `path`.

        Raises:
            InputError: the file is incomplete, or contains more than tensors and plain values.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} does not load as a checkpoint: {first_line(error)}") from error


def write_atomically(trainer: L.Trainer) -> None:
    """Give `trainer`'s strategy an `AtomicCheckpointIO`, unless the user chose another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def is_whole(path: Path) -> bool:
    """Return true if `path` is a complete checkpoint: a file with its end, or a distributed one with its index."""
    if path.is_dir():
        return is_whole_folder(path)
    try:
        # The directory of a zip archive is at its end, so a truncated file has none.
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def find_checkpoint(path: str | None, root: Path) -> str | None:
    """Return the checkpoint to resume from; `last` is the newest complete one of all runs under `root`.

    `auto` is the same, and None if there is none: for a command that a launcher repeats after a fault.

    Lightning would look for `last` in the folder of the new run, find none, and start again with a warning.

    Raises:
        InputError: the checkpoint does not exist or is incomplete. This is checked before the scoring pass.
    """
    if path is None or "://" in path:
        return path
    if path in ("last", "auto"):
        # A checkpoint in parts has the second name if the run was killed while a new one took its place.
        found = [file for name in (LAST, before(LAST)) for file in root.rglob(f"checkpoints/{name}")]
        for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
            if is_whole(file):
                return str(file)
            rank_zero_warn(f"--ckpt_path {path}: {file} is not whole and is passed over")
        if path == "auto":
            return None
        raise InputError(f"--ckpt_path last: no run under {root.resolve()} has a whole {LAST}")
    if not Path(path).exists():
        raise InputError(f"no checkpoint at {path!r} (looked from {Path.cwd()}); see --ckpt_path")
    if not is_whole(Path(path)):
        raise InputError(
            f"the checkpoint {path} is not whole: its end is missing, or it is another kind of file; "
            "resume from another, or with --ckpt_path last"
        )
    if Path(path).is_file() and _holds_weights_alone(Path(path)):
        raise InputError(
            f"the checkpoint {path} holds only weights, from which a run cannot be resumed: resume with "
            "--ckpt_path last, or write whole checkpoints with --checkpoint.save_weights_only false"
        )
    return path


def require_same_checkpoint(trainer: L.Trainer, path: str | None, identity: str) -> None:
    """Raise `InputError` on every process if two of them would resume from different checkpoints. All call this.

    Each process looks for the newest checkpoint itself: another run may write one in between, and machines may have
    folders of their own. Copies of one checkpoint are the same.

    Args:
        trainer: Trainer whose strategy has set up its environment.
        path: checkpoint of this process, or None.
        identity: key of the run's traits in a checkpoint.
    """
    if trainer.world_size == 1:
        return
    mine = _what_it_is(path, identity)
    first, named = trainer.strategy.broadcast((mine, path))
    if trainer.strategy.reduce_boolean_decision(differs := mine != first, all=False):
        other = f"process {trainer.global_rank} from {path or 'none'}" if differs else "another process names its own"
        raise InputError(
            f"processes would resume from different checkpoints: the first from {named or 'none'}, {other}. Give "
            "all processes, on every machine, the same path with --ckpt_path: last and auto take the newest checkpoint "
            "that each of them finds"
        )


def _what_it_is(path: str | None, identity: str) -> str:
    """Return the step and the run of the checkpoint at `path`, as text that is the same for copies of it."""
    if path is None or "://" in path:
        return str(path)
    file = Path(path) / META if Path(path).is_dir() else Path(path)
    try:
        # Its tensors remain on disk.
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError):
        # If it is so on every process, loading it says why.
        return "not readable"
    return repr([saved.get("global_step"), saved.get("epoch"), saved.get(identity)])


def _holds_weights_alone(path: Path) -> bool:
    try:
        return "optimizer_states" not in torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError):
        # Other faults are reported when the checkpoint is loaded.
        return False


class StopSignals(L.Callback):
    """Handles SIGINT and SIGTERM while the Trainer runs.

    During training, the run finishes the optimiser step and the validation that may follow it, writes `last.ckpt` and
    stops; a second signal stops it at once. Before the first step and after the last one, a signal stops it at once. If
    a signal reaches some ranks only, all ranks still stop after the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._waits = False
        self._saves = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's signal handlers, which would end this validation with status 0."""
        self._take_over()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace the signal handlers."""
        self._take_over()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Stop between two steps, after the validation that may follow a step, if any rank has received a signal.

        Raises:
            StoppedError: a rank has received a signal, and the checkpoint is written.
        """
        self._waits = True
        if batch_idx % trainer.accumulate_grad_batches:
            # Accumulated gradients are not part of a checkpoint.
            return
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        with before_the_batch(trainer):
            stopped = self._saved(trainer)
        raise stopped

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop here if a signal arrived after the last step, because what follows may take long.

        Raises:
            StoppedError: a signal arrived, and the checkpoint is written.
        """
        self._waits = False
        self._saves = True
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            raise self._saved(trainer)
        for callback in trainer.checkpoint_callbacks if trainer.world_size > 1 else ():
            # If only one rank is stopped later, it cannot save alone, and the others may never learn of the signal.
            step = getattr(callback, "_last_global_step_saved", trainer.global_step)
            if hasattr(callback, "write_now") and step < trainer.global_step:
                callback.write_now(trainer, self._path(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the signal handlers."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers; save the policy if the measurements after the last step are stopped."""
        self._restore()
        if isinstance(exception, StoppedError) and self._saves and not exception.saved and trainer.world_size == 1:
            exception.args = (str(self._saved(trainer)),)
            exception.saved = True

    def _saved(self, trainer: L.Trainer) -> StoppedError:
        path = self._path(trainer)
        trainer.save_checkpoint(path)
        self._saves = False
        name = signal.Signals(self._received).name if self._received else "a signal to another process"
        number = self._received
        if number is None and trainer.is_global_zero:
            # The exit status of this process is that of the command.
            number = signal.SIGTERM
        return StoppedError(
            f"stopped by {name} after {trainer.global_step} optimiser steps; {path} is written; resume with the same "
            f"command and --ckpt_path {path}",
            number,
            saved=True,
        )

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        return checkpoint_folder(trainer) / LAST

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # This is a worker process that inherited the handler; the main process ends it.
            return
        if not self._waits or self._received is not None:
            self._received = number
            raise StoppedError(f"stopped by {signal.Signals(number).name}", number)
        self._received = number
        rank_zero_info(f"{signal.Signals(number).name}: finishing the step, then saving; a second one stops at once")

    def _take_over(self) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # At the end of a fit the Trainer has restored the handlers itself, and the one from before was its own.
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        self._before.clear()


@contextmanager
def before_the_batch(trainer: L.Trainer) -> Iterator[None]:
    """Set Lightning's counters back to their values before the current batch, for a checkpoint.

    Lightning expects checkpoints at the end of a batch or of a validation. Resumed from one in between, a run would log
    everything one step later than an uninterrupted run.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    was_last = progress.is_last_batch
    progress.total.ready -= 1
    progress.current.ready -= 1
    progress.is_last_batch = False
    assert trainer.fit_loop._data_fetcher is not None
    # A resumed run passes the end of the validation or epoch again, and counts its last step again.
    counted_again = int(loop._should_check_val_fx(trainer.fit_loop._data_fetcher))
    loop._batches_that_stepped -= counted_again
    try:
        yield
    finally:
        loop._batches_that_stepped += counted_again
        progress.is_last_batch = was_last
        progress.current.ready += 1
        progress.total.ready += 1


def keep_epoch_open(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Count in `checkpoint` an epoch of which batches are left as not yet processed, so that a resume takes them.

    Lightning counts every epoch that ends as processed, also one that `max_steps` or a stop has ended early. Resumed
    with more steps, the run would begin the next epoch, or end at once if there is none.
    """
    if "loops" not in checkpoint:
        return
    state = checkpoint["loops"]["fit_loop"]
    done = state["epoch_loop.batch_progress"]["current"]["processed"]
    epochs = state["epoch_progress"]
    ended = epochs["total"]["processed"] == epochs["total"]["started"]
    if ended and 0 < done < trainer.num_training_batches:
        for counts in epochs.values():
            counts["processed"] -= 1


def is_amid_accumulation(trainer: L.Trainer) -> bool:
    """Return true if training has accumulated gradients for a step that is not complete."""
    under_way = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return under_way and trainer.fit_loop.epoch_loop._should_accumulate()


def known_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder in which `last.ckpt` is written at validations; None before Lightning has chosen it."""
    for callback in trainer.checkpoint_callbacks:
        if hasattr(callback, "write_now") and (folder := getattr(callback, "dirpath", None)) is not None:
            return Path(folder)
    return None


def checkpoint_folder(trainer: L.Trainer) -> Path:
    """Return the folder of the run's checkpoints. All ranks call this.

    Loggers such as that of W&B keep all runs in one folder, in which Lightning gives each run its own checkpoints.
    """
    return known_folder(trainer) or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def what_is_saved(folder: Path, resumed_from: str | None) -> str:
    """Describe what a stopped run has saved in `folder`, and how to resume it.

    Args:
        folder: folder of the run's checkpoints.
        resumed_from: checkpoint from which the run was resumed, if any.
    """
    path = folder / LAST
    if is_whole(path):
        return f"{path} is written; resume with the same command and --ckpt_path {path}"
    if resumed_from is not None:
        return f"nothing new is saved; resume with the same command and --ckpt_path {resumed_from}"
    return "no step is saved yet; the same command begins again, with the scores that are already cached"
