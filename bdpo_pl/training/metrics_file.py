"""The metrics file of a run that is resumed in its own folder: it continues from the rows before the checkpoint."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from bdpo_pl.files import write_whole
from bdpo_pl.parallel.saved_parts import META

_KEY = "bdpo_pl_metrics_rows"
_KEPT = ".metrics.csv.kept"


class MetricsRows(L.Callback):
    """Writes every logged row to disk before a checkpoint, and saves the number of rows in it.

    Lightning's logger writes at every hundredth step, and deletes an existing file when a run begins in its folder.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the rows and count them, on the rank that logs."""
        checkpoint[_KEY] = None
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and trainer.is_global_zero:
                logger.save()
                checkpoint[_KEY] = len(_read(Path(logger.experiment.metrics_file_path))[1])


@rank_zero_only
def continue_metrics(trainer: L.Trainer, checkpoint: str | None) -> None:
    """Keep the rows of `metrics.csv` that were logged before `checkpoint`, if the run continues in its folder.

    This must be called before `trainer.fit`, because the logger then begins a new file.

    Args:
        trainer: Trainer with its loggers.
        checkpoint: checkpoint from which the run is resumed, if any.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    if checkpoint is None or not loggers:
        return
    # One in parts is a folder.
    values = Path(checkpoint) / META if Path(checkpoint).is_dir() else Path(checkpoint)
    if not values.is_file():
        return
    logger = loggers[0]
    folder = Path(logger.log_dir)
    if Path(checkpoint).resolve().parent.parent != folder.resolve():
        return
    file, kept = folder / "metrics.csv", folder / _KEPT
    # Renamed while the logger deletes its file, so that a process killed here loses nothing.
    if file.is_file() and not kept.is_file():
        file.rename(kept)
    if not kept.is_file():
        return
    names, rows = _read(kept)
    count = torch.load(values, map_location="cpu", mmap=True, weights_only=True).get(_KEY)
    if count is None:
        rank_zero_warn(f"{checkpoint} does not say how many rows of {file} were logged before it; all are kept")
        count = len(rows)
    with warnings.catch_warnings():
        # The logger warns that it will delete existing files, but here there are none.
        warnings.filterwarnings("ignore", message=".*Previous log files")
        writer = logger.experiment
    # The logger writes its rows in the order of names; a finished run's file begins with `step` and `epoch`.
    names = sorted(names)
    writer.metrics_keys = list(names)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=names)
    table.writeheader()
    table.writerows(rows[:count])
    write_whole(file, text.getvalue())
    kept.unlink()


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return column names and rows; empty lists if there is no file."""
    if not path.is_file():
        return [], []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return list(reader.fieldnames or []), rows


def step_first(file: Path) -> None:
    """Move the columns `step` and `epoch` of a finished run's metrics to the front; the others are in order of name."""
    names, rows = _read(file)
    first = [name for name in ("step", "epoch") if name in names]
    if names[: len(first)] == first:
        return
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=[*first, *(name for name in names if name not in first)])
    table.writeheader()
    table.writerows(rows)
    write_whole(file, text.getvalue())
