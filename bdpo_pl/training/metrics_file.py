"""The metrics of a run that is resumed in its own folder: they go on where the checkpoint was written."""

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

_KEY = "bdpo_pl_metrics_rows"
_KEPT = ".metrics.csv.kept"


class MetricsRows(L.Callback):
    """Puts every logged row on disk before a checkpoint, and the number of rows into it.

    Lightning's logger writes every hundredth step, and deletes the file when a run begins in a folder that has one.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the rows, and count them; on the rank that logs."""
        checkpoint[_KEY] = None
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and trainer.is_global_zero:
                logger.save()
                checkpoint[_KEY] = len(_read(Path(logger.experiment.metrics_file_path))[1])


@rank_zero_only
def continue_metrics(trainer: L.Trainer, checkpoint: str | None) -> None:
    """Keep the rows of `metrics.csv` that were logged before `checkpoint`, if the run goes on in its folder.

    To be called before `trainer.fit`, which makes the logger write a file of its own.

    Args:
        trainer: With its loggers.
        checkpoint: What the run goes on from.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    if checkpoint is None or not loggers or not Path(checkpoint).is_file():
        return
    logger = loggers[0]
    folder = Path(logger.log_dir)
    if Path(checkpoint).resolve().parent.parent != folder.resolve():
        return
    file, kept = folder / "metrics.csv", folder / _KEPT
    # Under another name while the logger deletes its own, so that a process killed here loses nothing.
    if file.is_file() and not kept.is_file():
        file.rename(kept)
    if not kept.is_file():
        return
    names, rows = _read(kept)
    count = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True).get(_KEY)
    if count is None:
        rank_zero_warn(f"{checkpoint} does not say how many rows of {file} were logged before it; all are kept")
        count = len(rows)
    with warnings.catch_warnings():
        # That it deletes what is in the folder, which it has not found there.
        warnings.filterwarnings("ignore", message=".*Previous log files")
        writer = logger.experiment
    writer.metrics_keys = list(names)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=names)
    table.writeheader()
    table.writerows(rows[:count])
    write_whole(file, text.getvalue())
    kept.unlink()


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows; none if there is no file."""
    if not path.is_file():
        return [], []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return list(reader.fieldnames or []), rows


def step_first(file: Path) -> None:
    """Put the columns `step` and `epoch` of a finished run's metrics before the others, which are in order of name."""
    names, rows = _read(file)
    first = [name for name in ("step", "epoch") if name in names]
    if names[: len(first)] == first:
        return
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=[*first, *(name for name in names if name not in first)])
    table.writeheader()
    table.writerows(rows)
    write_whole(file, text.getvalue())
