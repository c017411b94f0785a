"""The study with a real model: its records as results by seed, and its four outcomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.study.real.plan import HALVES, METHODS, SEEDS, Cell, chosen, tuning
from benchmarks.study.report.results import Measure, Results, load_cells
from benchmarks.study.report.tables import Contrast, Group, contrast

DPO, BDPO = "DPO", "B-DPO"
GAP = Measure("margin gap, nats", lambda cell: cell["pairs"]["gap/margin"], percent=False, better=-1, digits=2)
RANKED = Measure("test pairs ranked right", lambda cell: cell["pairs"]["held_out/logp_accuracy"], better=1)
REFUSED = Measure(
    "harmful prompts refused",
    lambda cell: (cell["suites"]["xstest_harmful"] + cell["suites"]["strongreject"]) / 2,
    better=1,
)
SAFE_REFUSED = Measure("safe prompts refused", lambda cell: cell["suites"]["xstest_benign"], better=-1)

OUTCOMES = (GAP, RANKED, REFUSED, SAFE_REFUSED)
"""The registered outcomes, in the order of their numbers."""

PAIR_OUTCOMES = (
    Measure("training margin, nats", lambda cell: cell["pairs"]["train_probe/margin"], percent=False, digits=2),
    Measure("test margin, nats", lambda cell: cell["pairs"]["held_out/margin"], percent=False, better=1, digits=2),
    GAP,
    RANKED,
)
"""What is measured of the halves, for which no prompts are asked."""

MARGINS = (
    *PAIR_OUTCOMES[:2],
    Measure(
        "lost on test pairs",
        lambda cell: cell["pairs"]["gap/margin"] / cell["pairs"]["train_probe/margin"],
        better=-1,
    ),
)
"""What a margin gap is made of: both margins, and the gap as a share of the training margin. Not registered."""


def load_real(path: Path, name: str | None = None) -> Results:
    """Load the results in a file of records, the model before training as the final cells' reference.

    Args:
        path: JSONL file, as `python -m benchmarks.study.real` writes it.
        name: name of the file on the page; default: the path.

    Raises:
        InputError: there is no such file, or it contains no cell.
    """
    heads, cells = load_cells(path, "benchmarks.study.real")
    return Results(name or path.as_posix(), heads, map(_placed, cells.values()))


def _placed(record: dict[str, Any]) -> dict[str, Any]:
    setting = {"variant": record["cell"].get("half", ""), "epochs": 1, **record["cell"]}
    if setting["section"] == "reference":
        setting |= {"section": "final", "method": "reference"}
    return {**record, "setting": setting}


def trials(results: Results) -> list[tuple[Cell, dict[str, Any] | None, bool]]:
    """Return every trial with its record, None if it is not finished, and whether it is chosen."""
    records = {cell["key"]: cell for cell in results.cells}
    best = chosen(records)
    return [(cell, records.get(cell.key), best.get(cell.method) == cell) for cell in tuning()]


def group(method: str) -> Group:
    """Return the final cells of a method."""
    return Group(method, "final", method)


def against(first: str, second: str) -> Contrast:
    """Return the comparison of two methods, seed by seed."""
    return contrast(group(first), group(second))


def confirmed(method: str) -> Group:
    """Return the cells of a method on the second model."""
    return Group(method, "confirmation", method)


def half(name: str) -> Group:
    """Return the cells of DPO on one half of the pairs."""
    return Group(f"{name} half", "halves", DPO, name)


def progress(results: Results) -> dict[str, tuple[int, int]]:
    """Return finished and planned cells by section."""
    sections = [cell["setting"]["section"] for cell in results.cells if cell["setting"]["method"] != "reference"]
    reference = int(bool(results.pick("final", "reference")))
    return {
        "reference": (reference, 1),
        "trials": (sections.count("tuning"), len(tuning())),
        "final cells": (sections.count("final"), len(METHODS) * len(SEEDS)),
        "halves": (sections.count("halves"), len(HALVES) * len(SEEDS)),
    }
