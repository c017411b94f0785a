"""What experiment trackers get besides metrics: the options of a run at its start, its report at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger


def log_options(loggers: Iterable[Logger], options: Callable[[], Mapping[str, Any]]) -> None:
    """Log all options of a run. A `CSVLogger` gets none, because `config.yaml` lies beside its file.

    Args:
        loggers: loggers of the Trainer.
        options: function that returns the options by name, nested; it is called only where they are logged.
    """
    for logger in loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(dict(options()))


def log_files(loggers: Iterable[Logger], files: Iterable[Path]) -> None:
    """Upload files to W&B and MLflow; other loggers take none.

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
