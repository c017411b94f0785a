"""The paper's own numbers (arXiv:2603.22829, Qwen2-7B-Instruct, in %), for comparison with the study's."""

from __future__ import annotations

from benchmarks.study.report.tables import table

ABLATION = {
    "DPO": (84.03, 81.50, 65.85),
    "DPO+BW": (85.30, 82.50, 65.18),
    "DPO+SF": (86.58, 83.00, 65.31),
    "B-DPO": (92.01, 84.50, 65.72),
}
"""StrongReject, XSTest, AdvGLUE."""

MAIN = {
    "base": (80.51, 82.50, 97.37, 58.00, 68.56),
    "DPO": (84.03, 81.50, 93.54, 76.00, 70.63),
    "SafeDPO": (86.50, 80.50, 90.91, 68.00, 69.45),
    "B-DPO": (92.01, 84.50, 98.59, 80.00, 73.29),
}
"""StrongReject, XSTest, GCG, PAIR, average with general abilities: the legible rows."""


def main_table() -> str:
    """Return the main table's rows."""
    return _table(("StrongReject", "XSTest", "GCG", "PAIR", "average with general abilities"), MAIN)


def ablation_table() -> str:
    """Return the ablation's rows."""
    return _table(("StrongReject", "XSTest", "AdvGLUE"), ABLATION)


def _table(head: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> str:
    return table(["", *head], ([name, *(f"{value:.2f}" for value in values)] for name, values in rows.items()))
