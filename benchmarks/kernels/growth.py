"""Growth of an operation's time and memory with tokens, vocabulary and pairs: slopes on log-log axes.

A slope of 1 is proportional growth; the goal is 1.05 at most.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

GOAL = 1.05
CONTENDER = "ours, fused loss"
_N, _D, _V, _T = 1024, 128, 16_000, 64

AXES: dict[str, dict[int, str]] = {
    "tokens": {n: f"{n}x{_D}x{_V}x{_T}" for n in (512, 1024, 2048, 4096)},
    "vocabulary": {v: f"{_N}x{_D}x{v}x{_T}" for v in (8_000, 16_000, 32_000, 64_000)},
    "pairs": {pairs: f"{_N}x{_D}x{_V}x{_N // (2 * pairs)}" for pairs in (2, 8, 32, 128)},
}
"""Names of shapes, by the size that grows; the other sizes are constant."""


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope of log value over log size.

    Raises:
        ValueError: a value is not positive.
    """
    if min(values) <= 0:
        raise ValueError(f"a slope needs positive values, got {min(values)}")
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(v) for v in values]).slope


def measure_growth(run: Callable[[list[str]], dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure every axis.

    Args:
        run: function that measures shapes by name, and returns `points`, with `forward_backward_s` and `extra_bytes` of
            each, or `not_run`.
    """
    return [_axis(axis, list(shapes), run(list(shapes.values()))) for axis, shapes in AXES.items()]


def _axis(axis: str, sizes: list[int], result: dict[str, Any]) -> dict[str, Any]:
    if "not_run" in result:
        return {"axis": axis, "not_run": result["not_run"]}
    times = [min(point["forward_backward_s"]) for point in result["points"]]
    # Less than a mebibyte is what the interpreter itself allocates.
    extra = [max(point["extra_bytes"], 1 << 20) for point in result["points"]]
    return {
        "axis": axis,
        "contender": CONTENDER,
        "sizes": sizes,
        "time_s": times,
        "extra_bytes": extra,
        "time_slope": slope(sizes, times),
        "memory_slope": slope(sizes, extra),
    }


def markdown(growth: list[dict[str, Any]]) -> str:
    """Return a table with a row for each axis."""
    lines = [f"| {CONTENDER} | sizes | slope of time | slope of memory |", "|---|---|---|---|"]
    for row in growth:
        if "not_run" in row:
            lines.append(f"| {row['axis']} | not run: {row['not_run']} | | |")
            continue
        # Noise is in the third digit.
        found = [round(row[name], 2) for name in ("time_slope", "memory_slope")]
        slopes = [f"{value:.2f}{'' if value <= GOAL else ' > goal'}" for value in found]
        lines.append(f"| {row['axis']} | {', '.join(f'{size:,}' for size in row['sizes'])} | {' | '.join(slopes)} |")
    return "\n".join(lines)
