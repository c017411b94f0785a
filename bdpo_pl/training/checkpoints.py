"""Checkpoints that are whole or not there, the newest of them, and a run that writes one before it is stopped."""

from __future__ import annotations

import pickle
import signal
import threading
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bdpo_pl.errors import InputError, MachineError, StoppedError
from bdpo_pl.files import write_whole

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its name, forces it onto the disk and only then gives it the name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to the file `path`, all or nothing; a remote path as Lightning does.

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
        # Where the disk is full, torch's writer may raise an error of its own over that of the operating system.
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else _first_line(error)
            raise MachineError(
                f"the checkpoint {path} cannot be written ({reason}); the one before it is untouched. Free space, then "
                "go on with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The checkpoint at `path`.

        Raises:
            InputError: it is not whole, or holds more than tensors and plain values.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} does not load as a checkpoint: {_first_line(error)}") from error


def write_atomically(trainer: L.Trainer) -> None:
    """Give `trainer`'s strategy an `AtomicCheckpointIO`, unless the user chose a plugin of their own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def is_whole(path: Path) -> bool:
    """Whether `path` is a checkpoint with its end: a file, or a folder of a distributed one with its index."""
    if path.is_dir():
        return (path / ".metadata").is_file() and (path / "meta.pt").is_file()
    try:
        # The directory of a zip archive stands at its end, so what was cut off has none.
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def find_checkpoint(path: str | None, root: Path) -> str | None:
    """The checkpoint to resume from; `last` is the newest whole one of all runs under `root`.

    Lightning looks for `last` in the new run's own folder, finds none, and starts over with a warning.

    Raises:
        InputError: there is none, or it is not whole: found out now, and not after the scoring pass.
    """
    if path is None or "://" in path:
        return path
    if path == "last":
        found = sorted(root.rglob(f"checkpoints/{LAST}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in found:
            if is_whole(file):
                return str(file)
            rank_zero_warn(f"--ckpt_path last: {file} is not whole and is passed over")
        raise InputError(f"--ckpt_path last: no run under {root.resolve()} has a whole {LAST}")
    if not Path(path).exists():
        raise InputError(f"no checkpoint at {path!r} (looked from {Path.cwd()}); see --ckpt_path")
    if not is_whole(Path(path)):
        raise InputError(
            f"the checkpoint {path} is not whole: its end is missing, or it is another kind of file; "
            "resume from another, or with --ckpt_path last"
        )
    return path


class StopSignals(L.Callback):
    """On SIGINT or SIGTERM: finish the optimiser step, write `last.ckpt`, and stop; a second SIGINT stops at once.

    The ranks agree on the step, whichever of them the signal reached.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals, now that there is something to save."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps, after the validation that may lie there, see whether any rank was told to stop.

        Raises:
            StoppedError: one was, and the checkpoint is written.
        """
        if batch_idx % trainer.accumulate_grad_batches:
            # Gradients that wait for more batches are in no checkpoint.
            return
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / LAST
        trainer.save_checkpoint(path)
        name = signal.Signals(self._received).name if self._received else "a signal to another process"
        raise StoppedError(
            f"stopped by {name} after {trainer.global_step} optimiser steps; {path} is written, go on with "
            "--ckpt_path last",
            self._received,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        rank_zero_info(f"{signal.Signals(number).name}: finishing the step, then saving")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
