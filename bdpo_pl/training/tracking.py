"""What experiment trackers get besides metrics: options at the start, completions on the way, the report at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from bdpo_pl.training.trackio_logger import TrackioLogger


def log_options(loggers: Iterable[Logger], options: Callable[[], Mapping[str, Any]]) -> None:
    """Log all options of a run. A plain `CSVLogger` gets none, because `config.yaml` lies beside its file.

    Args:
        loggers: loggers of the Trainer.
        options: function that returns the options by name, nested; it is called only where they are logged.
    """
    for logger in loggers:
        if not isinstance(logger, CSVLogger) or isinstance(logger, TrackioLogger):
            logger.log_hyperparams(dict(options()))


def log_files(loggers: Iterable[Logger], files: Iterable[Path]) -> None:
    """Log files to W&B, MLflow and trackio; other loggers take none.

    Args:
        loggers: loggers of the Trainer.
        files: files, such as the report of the run; those that are not there are left out.
    """
    there = [file for file in files if file.is_file()]
    for logger in loggers:
        for file in there:
            if isinstance(logger, WandbLogger):
                # A name that is the same in each run makes their reports versions of one artefact, so it has the run's.
                name = f"{logger.experiment.id}-{file.stem}"
                logger.experiment.log_artifact(str(file), name=name, type=file.stem)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(file))
            elif isinstance(logger, TrackioLogger):
                logger.log_file(file)


def log_completions(loggers: Iterable[Logger], split: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log a table of completions to W&B, MLflow and trackio, and a text to TensorBoard; other loggers take none.

    Args:
        loggers: loggers of the Trainer.
        split: name of the set of prompts.
        rows: at least one row; all have the same fields.
        step: optimiser step.
    """
    key, columns, data = f"completions/{split}", list(rows[0]), [list(row.values()) for row in rows]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_text(key, columns, data, step=step)
        elif isinstance(logger, MLFlowLogger):
            # A file for each step, because a table would get the rows of a repeated step twice.
            logger.experiment.log_dict(logger.run_id, {"columns": columns, "data": data}, f"{key}/step-{step:06}.json")
        elif isinstance(logger, TrackioLogger):
            logger.log_table(key, rows, step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, _markdown(rows), step)


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as Markdown with each value as an indented code block, so that no mark in a text takes effect."""
    blocks = []
    for row in rows:
        for name, value in row.items():
            text = "\n".join(f"    {line}" for line in str(value).splitlines()) or "    "
            blocks.append(f"**{name}**\n\n{text}")
    return "\n\n".join(blocks)
