"""A logger for trackio, for which Lightning has none."""

from __future__ import annotations

import importlib.util
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from bdpo_pl.errors import InputError


class TrackioLogger(CSVLogger):
    """Logs metrics, options, completions and the report of a run to trackio, and metrics to `metrics.csv` as well.

    Without `space_id`, trackio keeps everything in a database on this machine (`TRACKIO_DIR`), which `trackio show`
    displays. The run's folder is that of the default logger.

    Args:
        project: trackio's project.
        name: name of the run in trackio. Default: trackio makes one.
        space_id: Hugging Face Space, OWNER/NAME, that gets the run. Default: this machine only.
        bucket_id: Hugging Face bucket in which the Space stores its data.
        private: make the Space private, if it does not exist yet. Default: as the owner's spaces are.
        resume: choice to continue the run of this `name` in trackio: `never`, `allow` (if there is one) or `must`.
        save_dir: folder of all runs.
        version: name of the run's folder. Default: the next `version_N`.

    Raises:
        InputError: trackio is not installed, or an option would have no effect.
    """

    def __init__(
        self,
        project: str = "bdpo-pl",
        name: str | None = None,
        space_id: str | None = None,
        bucket_id: str | None = None,
        private: bool | None = None,
        resume: Literal["never", "allow", "must"] = "never",
        save_dir: str = "runs",
        version: int | str | None = None,
    ) -> None:
        if importlib.util.find_spec("trackio") is None:
            raise InputError("TrackioLogger needs the package trackio, which is not installed: pip install trackio")
        for option, given in (("bucket_id", bucket_id), ("private", private)):
            if given is not None and space_id is None:
                raise InputError(f"trainer.logger.{option} is about trainer.logger.space_id, which is not set")
        if resume != "never" and not name:
            raise InputError("trainer.logger.resume finds a run by its name: set trainer.logger.name")
        super().__init__(save_dir, name="", version=version)
        self._options: dict[str, Any] = {
            "project": project, "name": name or None, "space_id": space_id, "bucket_id": bucket_id,
            "private": private, "resume": resume,
        }  # fmt: skip
        self._config: dict[str, Any] = {}
        self._waiting: list[tuple[dict[str, Any], int]] = []
        self._run: Any = None

    @property
    def run(self) -> Any:
        """Run of trackio, begun at the first access; trackio ends it with the process."""
        if self._run is None:
            import trackio

            self._run = trackio.init(config=self._config, embed=False, **self._options)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Keep options for trackio, which takes them when the run begins."""
        if self._run is not None:
            rank_zero_warn("trackio takes no options after the first metrics; later ones are not logged")
        self._config |= _flatten_dict(_convert_params(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics of an optimiser step."""
        super().log_metrics(dict(metrics), step)
        self._send_waiting()
        self.run.log({name: float(value) for name, value in metrics.items()}, step=step)

    @rank_zero_only
    def log_table(self, key: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log a table; one from before the first metrics waits for them, because options may still follow it."""
        import trackio

        table = trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._waiting.append(({key: table}, step))
        if self._run is not None:
            self._send_waiting()

    @rank_zero_only
    def log_file(self, path: Path) -> None:
        """Log a file as an artefact of the run."""
        self._send_waiting()
        # A name that is the same in each run makes their files versions of one artefact, so it has the run's.
        name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{self.run.name}-{path.stem}")
        self.run.log_artifact(path, name=name, type=path.stem)

    def _send_waiting(self) -> None:
        for table, step in self._waiting:
            self.run.log(table, step=step)
        self._waiting.clear()
