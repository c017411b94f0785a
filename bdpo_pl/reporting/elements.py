"""Elements of a report: tables, figures and findings. Their markup is in `elements.html`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from bdpo_pl.reporting.format import whole
from bdpo_pl.reporting.templates import element

Cell = str | int | None
Level = Literal["problem", "notice", "fine"]


@dataclass(frozen=True)
class Table:
    """A table of texts and whole numbers; the caller formats other numbers.

    Attributes:
        columns: headings of the columns; all empty for a table without headings.
        rows: cells of each row, one per column; None is shown as a dash.
        caption: description of the content.
        align: `l` or `r` for each column. Default: the first column left, the others right.

    Raises:
        ValueError: a row or `align` has another number of columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    align: str = ""

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows} | ({len(self.align)} if self.align else set())
        if widths - {len(self.columns)}:
            raise ValueError(f"table {self.caption!r}: {len(self.columns)} columns, but rows of {sorted(widths)}")

    @property
    def alignment(self) -> str:
        """`l` or `r` for each column."""
        return self.align or "l" + "r" * (len(self.columns) - 1)

    @property
    def has_headings(self) -> bool:
        """True if any column has a heading."""
        return any(self.columns)

    def text(self, cell: Cell) -> str:
        """Return the text of a cell."""
        if cell is None:
            return "–"
        return whole(cell) if isinstance(cell, int) else cell

    def __html__(self) -> Markup:
        return element("table", self)


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        title: heading above the plot.
        svg: drawing, with a description for readers who do not see it.
        numbers: plotted values, as a table that unfolds.
        caption: explanation below the plot.
    """

    title: str
    svg: Markup
    numbers: Table | None = None
    caption: str = ""

    def __html__(self) -> Markup:
        return element("figure", self)


@dataclass(frozen=True)
class Finding:
    """A fact that the reader should know, or that needs no concern."""

    level: Level
    title: str
    detail: str = ""

    def __html__(self) -> Markup:
        return element("finding", self)
