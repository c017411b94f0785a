"""Results as a Markdown table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MB = 1 << 20


def markdown(rows: list[dict[str, Any]], ceilings: dict[str, dict[str, Any]]) -> str:
    """Return one table per task: every contender at every shape, as a ratio to the naive one of the same run."""
    parts = []
    for task, title in (("linear", "From hidden states: loss and all gradients"), ("logits", "From logits")):
        mine = [row for row in rows if row["task"] == task]
        if mine:
            limit = "of the products' own rate" if task == "linear" else "of the copy bandwidth"
            head = f"| shape | contender | time, s | × naive | {limit} | extra MB | max deviation |"
            parts += [f"**{title}**", "", head, "|---|---|---|---|---|---|---|"]
            parts += [_row(row, mine, ceilings[row["shape"]]) for row in mine]
            parts.append("")
    return "\n".join(parts)


def _row(row: dict[str, Any], rows: list[dict[str, Any]], ceiling: dict[str, Any]) -> str:
    head = f"| {row['shape']} | {row['contender']} |"
    if "not_run" in row:
        return f"{head} not run: {row['not_run']} | | | | |"
    base = next((r for r in rows if r["shape"] == row["shape"] and r["contender"] == "naive"), None)
    ratio = f"{row['time_s'] / base['time_s']:.2f}" if base and "time_s" in base else "–"
    deviation = "another loss" if row["deviation"] is None else f"{row['deviation']:.0e}"
    share = f"{share_of_limit(row, ceiling):.0%}"
    return f"{head} {row['time_s']:.4g} | {ratio} | {share} | {row['extra_bytes'] / _MB:,.0f} | {deviation} |"


def share_of_limit(row: dict[str, Any], ceiling: dict[str, Any]) -> float:
    """Return the share of the machine's own limit; 1 is as fast as the necessary work alone."""
    if row["task"] == "linear":
        return ceiling["products_s"] / row["time_s"]
    # Logits are read twice and their gradient is written once.
    return 3 * row["logits_bytes"] / row["time_s"] / ceiling["copy_bytes_per_s"]


def plot(rows: list[dict[str, Any]], growth: list[dict[str, Any]], path: Path) -> bool:
    """Plot each contender's ratio to naive and extra memory, one column per shape, and the growth of costs below.

    Returns:
        False without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    done = [row for row in rows if row["task"] == "linear" and "time_s" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in done))
    grown = [one for one in growth if "time_s" in one]
    columns = max(1, len(shapes), len(grown))
    figure, axes = pyplot.subplots(
        3 if grown else 2, columns, figsize=(5 * columns, 11 if grown else 8), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for (time, memory), shape in zip(axes[:2].T, shapes, strict=False):
        _bars(time, memory, shape, [row for row in done if row["shape"] == shape])
    for axis, one in zip(axes[-1] if grown else [], grown, strict=False):
        _growth(axis, one)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _bars(time: Any, memory: Any, shape: str, rows: list[dict[str, Any]]) -> None:
    names = [row["contender"] for row in rows]
    colours = ["C3" if name.startswith("ours") else "C0" for name in names]
    base = next((row["time_s"] for row in rows if row["contender"] == "naive"), None)
    time.barh(names, [row["time_s"] / (base or 1.0) for row in rows], color=colours)
    time.set(title=shape, xlabel="forward + backward, × naive" if base else "forward + backward, s")
    memory.barh(names, [max(0, row["extra_bytes"]) / _MB for row in rows], color=colours)
    memory.set(xlabel="extra peak memory, MB")
    for axis in (time, memory):
        axis.set_visible(True)
        axis.invert_yaxis()


def _growth(axis: Any, one: dict[str, Any]) -> None:
    axis.set_visible(True)
    time = [value / one["time_s"][0] for value in one["time_s"]]
    memory = [value / one["extra_bytes"][0] for value in one["extra_bytes"]]
    axis.loglog(one["sizes"], time, "o-", label=f"time, slope {one['time_slope']:.2f}")
    axis.loglog(one["sizes"], memory, "s--", label=f"memory, slope {one['memory_slope']:.2f}")
    axis.set(title=f"{one['contender']}: growth in {one['axis']}", xlabel=one["axis"], ylabel="× the smallest")
    axis.legend()
