"""Tables of what tuning has tried and chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bdpo_pl.errors import InputError
from benchmarks.study.report.results import Cell, Measure, Results
from benchmarks.study.report.statistics import quantile
from benchmarks.study.report.tables import MISSING, number, table
from benchmarks.study.run.evaluate import validation_score
from benchmarks.study.run.plan import METHODS

SCORE = Measure("validation score", lambda cell: validation_score(cell["metrics"]), better=-1)
_ORDER = [method.name for method in METHODS]
# Largest difference between means of the same numbers that are added in different orders.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Trial:
    """A tried setting, with one or more seeds.

    Attributes:
        cells: one cell for each seed.
    """

    cells: tuple[Cell, ...]

    @property
    def setting(self) -> dict[str, Any]:
        """Setting of the first seed."""
        found: dict[str, Any] = self.cells[0]["setting"]
        return found

    @property
    def scores(self) -> list[float]:
        """Scores in percent, by seed; NaN for a failed seed."""
        return [SCORE.of(cell) for cell in self.cells]

    @property
    def score(self) -> float:
        """Mean score over seeds; NaN if one has failed, so that the trial is not chosen."""
        return math.fsum(self.scores) / len(self.cells)


def trials(results: Results, method: str) -> dict[str, Trial]:
    """Return a method's trials by the tried values."""
    found: dict[str, list[Cell]] = {}
    for cell in results.pick("tuning", method):
        found.setdefault(_tried(cell), []).append(cell)
    return {name: Trial(tuple(cells)) for name, cells in found.items()}


def all_trials(results: Results) -> dict[str, dict[str, Trial]]:
    """Return trials by method."""
    return {name: trials(results, name) for name in results.methods("tuning", _ORDER)}


def error(results: Results) -> tuple[float, int]:
    """Return half the 95 % interval of a trial's mean, from the variance between seeds pooled over all trials.

    Returns:
        Half width in points, NaN if no trial has two seeds; and the number of seeds of a trial.
    """
    squares, freedom, seeds = 0.0, 0, 1
    for mine in all_trials(results).values():
        for trial in mine.values():
            if len(trial.cells) > 1 and math.isfinite(trial.score):
                squares += math.fsum((score - trial.score) ** 2 for score in trial.scores)
                freedom += len(trial.cells) - 1
                seeds = max(seeds, len(trial.cells))
    return (quantile(freedom) * math.sqrt(squares / freedom / seeds) if freedom else math.nan), seeds


def chosen_table(results: Results) -> str:
    """Return a row for each method: how much was tried, what was chosen, and its score.

    Raises:
        InputError: a method is tested in a setting that its own trials did not choose.
    """
    rows = []
    for name, mine in all_trials(results).items():
        scores = sorted(trial.score for trial in mine.values() if math.isfinite(trial.score))
        row = [name, str(len(mine)), str(len(mine) - len(scores))]
        tested = _tested(results, name)
        trial = mine.get(_tried(tested)) if tested else None
        if tested is None or trial is None:
            rows.append([*row, *[MISSING] * 4])
            continue
        if not trial.score <= scores[0] + _ROUNDING:
            raise InputError(
                f"{results.name}: {name} is tested with {_tried(tested)}, and another trial has a smaller validation "
                "score; `python -m benchmarks.study --prune --out FILE`, and run the study again"
            )
        setting = trial.setting
        row += [arguments(setting), f"{setting['learning_rate']:g}, {setting['epochs']}", number(trial.score, 1)]
        rows.append([*row, _edges(mine, setting)])
    head = ["method", "trials", "failed", "loss", "learning rate, epochs", "score of the chosen", "at the grid's edge"]
    return table(head, rows)


def trials_table(results: Results) -> str:
    """Return the validation scores of all trials: a row per loss, a column per learning rate and number of epochs."""
    everything = all_trials(results)
    columns = sorted({_column(trial.setting) for mine in everything.values() for trial in mine.values()})
    rows = []
    for name, mine in everything.items():
        tested = _tested(results, name)
        bold = _tried(tested) if tested else None
        by_loss: dict[str, dict[tuple[float, int], str]] = {}
        for tried, trial in sorted(mine.items(), key=lambda item: item[1].setting["arguments"].get("beta", 0.0)):
            text = number(trial.score, 1) if math.isfinite(trial.score) else "failed"
            text = f"**{text}**" if tried == bold else text
            by_loss.setdefault(arguments(trial.setting), {})[_column(trial.setting)] = text
        for loss, texts in by_loss.items():
            rows.append([name, loss, *(texts.get(column, MISSING) for column in columns)])
    return table(["method", "loss", *(f"{rate:g}, {epochs}" for rate, epochs in columns)], rows)


def arguments(setting: dict[str, Any]) -> str:
    """Format the arguments of a loss, as `β 0.1, τ 0.25`."""
    signs = {"beta": "β", "tau": "τ"}
    return ", ".join(f"{signs.get(name, name)} {_value(value)}" for name, value in setting["arguments"].items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _edges(mine: dict[str, Trial], setting: dict[str, Any]) -> str:
    """Name the chosen values that are the smallest or largest of more than two tried ones."""
    reads: dict[str, Callable[[dict[str, Any]], float]] = {
        "β": lambda setting: setting["arguments"]["beta"],
        "learning rate": lambda setting: setting["learning_rate"],
    }
    found = []
    for name, read in reads.items():
        tried = sorted({read(trial.setting) for trial in mine.values()})
        if len(tried) > 2 and read(setting) in (tried[0], tried[-1]):
            found.append(f"{name} {'smallest' if read(setting) == tried[0] else 'largest'}")
    return ", ".join(found) or "no"


def _tested(results: Results, method: str) -> Cell | None:
    cells = results.pick("final", method)
    return cells[0] if cells else None


def _column(setting: dict[str, Any]) -> tuple[float, int]:
    return setting["learning_rate"], setting["epochs"]


def _tried(cell: Cell) -> str:
    rate, epochs = _column(cell["setting"])
    return f"{json.dumps(cell['setting']['arguments'], sort_keys=True)}, learning rate {rate:g}, epochs {epochs}"
