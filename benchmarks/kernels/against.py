"""Comparison of two results of `python -m benchmarks.kernels`: what has become slower or larger beyond noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A smaller difference is not called a change, even in quiet runs.
TIME_TOLERANCE = 0.05
MEMORY_TOLERANCE = 0.05
MEMORY_BYTES = 8 << 20
_MB = 1 << 20


@dataclass(frozen=True)
class Change:
    """One contender at one shape, before and after.

    Attributes:
        task: "linear" or "logits".
        shape: name of the shape.
        contender: name of the contender.
        time: new time over old; relative to the naive contender of the same run if both runs have it.
        noise: relative change of `time` that the spread of both runs explains.
        old_bytes: extra peak memory before.
        new_bytes: extra peak memory after.
    """

    task: str
    shape: str
    contender: str
    time: float
    noise: float
    old_bytes: int
    new_bytes: int

    @property
    def slower(self) -> bool:
        """True if the time has grown beyond noise."""
        return self.time > 1 + max(TIME_TOLERANCE, self.noise)

    @property
    def larger(self) -> bool:
        """True if the memory has grown by more than allocators vary."""
        return self.new_bytes > self.old_bytes * (1 + MEMORY_TOLERANCE) + MEMORY_BYTES

    @property
    def verdict(self) -> str:
        """Short verdict for the table."""
        found = [word for word, holds in (("SLOWER", self.slower), ("LARGER", self.larger)) if holds]
        return ", ".join(found) or ("faster" if self.time < 1 - max(TIME_TOLERANCE, self.noise) else "")


def read(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        SystemExit: there is no such file, or it is not a result of this benchmark.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path}: {error}; give a JSON file that `python -m benchmarks.kernels` has written") from None
    if not isinstance(report, dict) or "rows" not in report:
        raise SystemExit(f"{path} has no `rows`; give a JSON file that `python -m benchmarks.kernels` has written")
    return report


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return the changes of what both results have measured, in the order of the new one."""
    before, after = (_measured(report) for report in (old, new))
    return [_change(key, before, after) for key in after if key in before]


Key = tuple[str, str, str]


def _measured(report: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    rows = (row for row in report["rows"] if "time_s" in row)
    return {(row["task"], row["shape"], row["contender"]): row for row in rows}


def _change(key: Key, before: dict[Key, dict[str, Any]], after: dict[Key, dict[str, Any]]) -> Change:
    task, shape, contender = key
    old, new, naive = before[key], after[key], (task, shape, "naive")
    time, noise = new["time_s"] / old["time_s"], _spread(old) + _spread(new)
    if contender != "naive" and naive in before and naive in after:
        # A slower machine makes the naive contender slower too.
        time /= after[naive]["time_s"] / before[naive]["time_s"]
        noise += _spread(before[naive]) + _spread(after[naive])
    return Change(task, shape, contender, time, noise, old["extra_bytes"], new["extra_bytes"])


def _spread(row: dict[str, Any]) -> float:
    """Return half the range of the timed runs relative to their median: 0 for a single run, whose noise is unknown."""
    return (max(row["times_s"]) - min(row["times_s"])) / 2 / row["time_s"]


def markdown(found: list[Change]) -> str:
    """Return a row for each change."""
    lines = [
        "| task | shape | contender | time, × old | noise | extra MB, old → new | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.task} | {one.shape} | {one.contender} | {one.time:.2f} | ± {one.noise:.2f} | "
        f"{one.old_bytes / _MB:,.0f} → {one.new_bytes / _MB:,.0f} | {one.verdict} |"
        for one in found
    ]
    return "\n".join(lines)


def remarks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the facts that make the two results hard to compare."""
    found = []
    for name in ("device", "cores"):
        one, two = (report.get("machine", {}).get(name) for report in (old, new))
        if one != two:
            found.append(
                f"Another machine: {name} {one} before, {two} now; only ratios to the naive contender compare."
            )
    return found
