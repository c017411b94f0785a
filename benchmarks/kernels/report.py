"""Results as a Markdown table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MB = 1 << 20


def markdown(rows: list[dict[str, Any]], ceilings: dict[str, dict[str, Any]]) -> str:
    """One table for each task: every contender at every shape, by ratio to the naive one of the same run."""
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
    """Share of the machine's own limit: 1 is as fast as the work that cannot be left out."""
    if row["task"] == "linear":
        return ceiling["products_s"] / row["time_s"]
    # Logits are read twice and their gradient is written once.
    return 3 * row["logits_bytes"] / row["time_s"] / ceiling["copy_bytes_per_s"]


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Time against memory for the linear task, one panel a shape. False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    done = [row for row in rows if row["task"] == "linear" and "time_s" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in done))
    figure, axes = pyplot.subplots(1, max(1, len(shapes)), figsize=(5 * max(1, len(shapes)), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=False):
        for row in (r for r in done if r["shape"] == shape):
            ours = row["contender"].startswith("ours")
            axis.scatter(row["extra_bytes"] / _MB, row["time_s"], color="C3" if ours else "C0")
            axis.annotate(row["contender"], (row["extra_bytes"] / _MB, row["time_s"]), fontsize=7)
        axis.set(
            title=shape, xlabel="extra peak memory, MB", ylabel="forward + backward, s", xscale="log", ylim=(0, None)
        )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
