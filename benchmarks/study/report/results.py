"""The records of a study as numbers by seed, from which the report's tables and figures are made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdpo_pl.errors import InputError
from benchmarks.study.run.evaluate import FRAMED, HARMFUL, HELD_OUT_CATEGORIES
from benchmarks.study.run.records import read_heads, read_records

Cell = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number of a cell.

    Attributes:
        name: heading of its column.
        read: function that reads the number from a cell; raises KeyError if it was not measured.
        percent: true for a share, shown in percent, with differences in points.
        better: +1 if more is better, −1 if less is, 0 if neither.
        digits: number of digits after the decimal point.
    """

    name: str
    read: Callable[[Cell], float]
    percent: bool = True
    better: int = 0
    digits: int = 1

    @property
    def head(self) -> str:
        """Name, with an arrow in the direction that is better."""
        return self.name + {1: " ↑", -1: " ↓", 0: ""}[self.better]

    def of(self, cell: Cell) -> float:
        """Return the number, in percent for a share; NaN if the cell failed or did not measure it."""
        try:
            value = float(self.read(cell))
        except (KeyError, TypeError, ZeroDivisionError):
            return math.nan
        return 100 * value if self.percent else value


def _other(cell: Cell) -> float:
    kinds = cell["metrics"]["kinds"].values()
    return sum(counts["other"] for counts in kinds) / sum(sum(counts.values()) for counts in kinds)


def _pairs(name: str) -> Callable[[Cell], float]:
    return lambda cell: cell["metrics"]["pairs"][name]


def attack(name: str) -> Callable[[Cell], float]:
    """Return a reader of attack success on a set of prompts."""
    return lambda cell: cell["metrics"]["attack_success"][name]


REFUSAL = Measure("refusal, held-out acts", lambda cell: 1 - attack(HARMFUL)(cell), better=1)
REFUSAL_CATEGORIES = Measure(
    "refusal, held-out categories", lambda cell: 1 - attack(HELD_OUT_CATEGORIES)(cell), better=1
)
FRAMED_ATTACKS = Measure("attack success, unseen framings", attack("framed"), better=-1)
OVER_REFUSAL = Measure("over-refusal", lambda cell: cell["metrics"]["over_refusal"]["mean"], better=-1)
ABILITY = Measure("ability", lambda cell: cell["metrics"]["ability"]["all"], better=1)
TRAIN_MARGIN = Measure("training margin, nats", _pairs("train_probe/margin"), percent=False, digits=2)
HELD_OUT_MARGIN = Measure("held-out margin, nats", _pairs("held_out/margin"), percent=False, digits=2)
GAP = Measure("gap, nats", _pairs("gap/margin"), percent=False, better=-1, digits=2)
GAP_SHARE = Measure(
    "gap, share of training margin", lambda cell: _pairs("gap/margin")(cell) / _pairs("train_probe/margin")(cell)
)
OTHER = Measure("answers of no known kind", _other, better=-1)
SECONDS = Measure("training, s", lambda cell: cell["seconds_training"], percent=False)
CPU_SECONDS = Measure("cell, s of a core", lambda cell: cell["cpu_seconds"], percent=False)
FRAMING_GAP = Measure("framed − plain attack success", lambda cell: attack("framed")(cell) - attack(HARMFUL)(cell))

OUTCOMES = (REFUSAL, REFUSAL_CATEGORIES, FRAMED_ATTACKS, OVER_REFUSAL, ABILITY)
"""Measures by which a method is judged: rates on prompts that no training has seen."""

CHIEF = (REFUSAL, FRAMED_ATTACKS, OVER_REFUSAL, GAP)
"""Measures shown if there is room for four."""


class Results:
    """Finished cells, and the known facts about the runs that made them.

    Args:
        name: name of the file on the page.
        heads: one entry for each call of the study's command: command, date, machine.
        cells: records of the cells.

    Raises:
        InputError: two cells take the same place in the tables.
    """

    def __init__(self, name: str, heads: list[dict[str, Any]], cells: Iterable[Cell]) -> None:
        self.name, self.heads, self.cells = name, heads, list(cells)
        places: dict[tuple[Any, ...], str] = {}
        for cell in self.cells:
            at = place(cell)
            if at in places:
                raise InputError(
                    f"{name}: cells {places[at]} and {cell['key']} are both of {at[:4]}; they come from different "
                    "plans: `python -m benchmarks.study --prune --out FILE` takes out what the plan has not"
                )
            places[at] = cell["key"]

    def pick(self, section: str, method: str | None = None, variant: str | None = None) -> list[Cell]:
        """Return the cells of a section in the order of seeds, including failed ones."""
        found = [
            cell
            for cell in self.cells
            if cell["setting"]["section"] == section
            and method in (None, cell["setting"]["method"])
            and variant in (None, cell["setting"]["variant"])
        ]
        return sorted(found, key=lambda cell: int(cell["setting"]["seed"]))

    def series(self, measure: Measure, section: str, method: str, variant: str = "") -> dict[int, float]:
        """Return finite values by seed."""
        values = {cell["setting"]["seed"]: measure.of(cell) for cell in self.pick(section, method, variant)}
        return {seed: value for seed, value in values.items() if math.isfinite(value)}

    def methods(self, section: str, order: Iterable[str]) -> list[str]:
        """Return the methods of a section, in `order`, followed by others."""
        there = list(dict.fromkeys(cell["setting"]["method"] for cell in self.pick(section)))
        known = [name for name in order if name in there]
        return known + sorted(name for name in there if name not in known and name != "reference")

    def framings(self) -> list[str]:
        """Return the names of the test's framings, in its order."""
        for cell in self.pick("final"):
            if "metrics" in cell:
                names = cell["metrics"]["attack_success"]
                return [name.removeprefix(FRAMED) for name in names if name.startswith(FRAMED)]
        return []


def place(cell: Cell) -> tuple[Any, ...]:
    """Return the place of a cell: section, method, variant, seed, and in the tuning the tried values."""
    setting = cell["setting"]
    trial = ()
    if setting["section"] == "tuning":
        trial = (json.dumps(setting["arguments"], sort_keys=True), setting["learning_rate"], setting["epochs"])
    return setting["section"], setting["method"], setting["variant"], setting["seed"], *trial


def load(path: Path, name: str | None = None) -> Results:
    """Load the results in a file of records.

    Args:
        path: JSONL file, as `python -m benchmarks.study` writes it.
        name: name of the file on the page; default: the path.

    Raises:
        InputError: there is no such file, or it contains no cell.
    """
    heads, cells = load_cells(path, "benchmarks.study")
    return Results(name or path.as_posix(), heads, cells.values())


def load_cells(path: Path, module: str) -> tuple[list[dict[str, Any]], dict[str, Cell]]:
    """Return one entry for each call of a study's command, and its finished cells by key.

    Args:
        path: JSONL file.
        module: module that writes it, for the errors.

    Raises:
        InputError: there is no such file, or it contains no cell.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; run `python -m {module}` first, or give the file it has written")
    cells = read_records(path)
    if not cells:
        raise InputError(f"{path}: no finished cell; run `python -m {module} --out {path}`")
    return read_heads(path), cells
