"""Display of the diagnosis in a terminal; texts of the data are never printed."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from bdpo_pl.data.held_out import called
from bdpo_pl.diagnosis.measures import Group
from bdpo_pl.diagnosis.results import Diagnosis
from bdpo_pl.reporting.format import fixed, general, mean_text, percent, ratio, whole

_MOST_CATEGORIES = 6


def numbers_table(diagnosis: Diagnosis) -> Table:
    """Return the means of each split, and the training pairs' most imbalanced categories."""
    unit = f", {diagnosis.unit}" if diagnosis.unit else ""
    table = Table(title=Text(f"Comprehension{unit}"), title_justify="left", caption_justify="left")
    table.caption = (
        "± is the 95 % interval of a mean; spread is 1.4826 × the median absolute deviation of the imbalance"
    )
    for column in ("", "pairs", "chosen", "rejected", "imbalance", "spread", "strong"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, split in diagnosis.splits.items():
        table.add_row(*_row(Text(called(name), "bold"), split.overall))
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
        name, whole(group.pairs), mean_text(group.chosen), mean_text(group.rejected), mean_text(group.imbalance),
        "–" if group.spread is None else fixed(group.spread, 3),
        percent(group.strong),
    ]  # fmt: skip


def tau_table(diagnosis: Diagnosis) -> Table:
    """Return the effects of several τ on the training pairs, including the one in use and that of `auto`."""
    table = Table(title="τ: larger weight over smaller", title_justify="left")
    for column in ("τ", "", "median", "95 % within", "largest"):
        table.add_column(column, justify="left" if not column else "right")
    for row in diagnosis.temperatures:
        marks = [w for w, tau in (("in use", diagnosis.tau), ("auto", diagnosis.suggested_tau)) if tau == row.tau]
        style = "bold" if marks else ""
        table.add_row(
            general(row.tau), ", ".join(marks), *(ratio(x) for x in (row.median, row.p95, row.largest)), style=style
        )
    return table
