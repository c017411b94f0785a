"""The diagnosis in a terminal; texts of the data are never printed."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from bdpo_pl.diagnosis.measures import Group
from bdpo_pl.diagnosis.page import NAMES, told
from bdpo_pl.diagnosis.results import Diagnosis

_MOST_CATEGORIES = 6


def numbers_table(diagnosis: Diagnosis) -> Table:
    """Means of each split, and the training pairs' most imbalanced categories."""
    unit = f", {diagnosis.unit}" if diagnosis.unit else ""
    table = Table(title=Text(f"Comprehension{unit}"), title_justify="left")
    for column in ("", "pairs", "chosen", "rejected", "imbalance", "|imbalance|", "strong"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, split in diagnosis.splits.items():
        table.add_row(*_row(Text(NAMES[name], "bold"), split.overall))
    categories = diagnosis.splits["train"].categories
    if categories:
        table.add_section()
        for group in categories[:_MOST_CATEGORIES]:
            table.add_row(*_row(Text(group.name), group))
        if len(categories) > _MOST_CATEGORIES:
            table.add_row(Text(f"… {len(categories) - _MOST_CATEGORIES} more categories", "dim"))
    return table


def _row(name: Text, group: Group) -> list[Text | str]:
    return [
        name, f"{group.pairs:,}", told(group.chosen), told(group.rejected), told(group.imbalance), f"{group.size:.3f}",
        f"{group.strong:.1%}",
    ]  # fmt: skip
