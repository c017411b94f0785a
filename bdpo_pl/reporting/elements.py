"""Elements of a report: tables, figures and findings, each of which renders its own markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

Cell = str | int | None
Level = Literal["problem", "notice", "fine"]


@dataclass(frozen=True)
class Table:
    """A table of texts and whole numbers; the caller formats other numbers.

    Attributes:
        columns: headings of the columns; all empty for a table without headings.
        rows: cells of each row, one per column; None is shown as a dash.
        caption: description of the content.
        align: `l` or `r` for each column; default: the first column left, the others right.

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

    def __html__(self) -> Markup:
        align = self.align or "l" + "r" * (len(self.columns) - 1)
        heads = Markup("").join(
            Markup('<th scope="col" class="{}">{}</th>').format(a, column)
            for a, column in zip(align, self.columns, strict=True)
        )
        body = Markup("").join(Markup("<tr>{}</tr>").format(_cells(row, align)) for row in self.rows)
        # Focusable, so that a wide table can be scrolled with the keyboard.
        head = Markup("<thead><tr>{}</tr></thead>").format(heads) if any(self.columns) else ""
        return Markup(
            '<div class="scroll" role="region" tabindex="0" aria-label="{0}"><table><caption>{0}</caption>'
            "{1}<tbody>{2}</tbody></table></div>"
        ).format(self.caption, head, body)


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
        caption = Markup("<p>{}</p>").format(self.caption) if self.caption else ""
        numbers = (
            Markup("<details><summary>The numbers</summary>{}</details>").format(self.numbers) if self.numbers else ""
        )
        return Markup(
            '<figure><figcaption>{}</figcaption><div class="scroll" role="region" tabindex="0" aria-label="{}">{}</div>'
            "{}{}</figure>"
        ).format(self.title, self.title, self.svg, caption, numbers)


@dataclass(frozen=True)
class Finding:
    """A fact that the reader should know, or that needs no concern."""

    level: Level
    title: str
    detail: str = ""

    def __html__(self) -> Markup:
        return Markup('<li class="{0}"><span class="level">{0}</span><div><strong>{1}</strong> {2}</div></li>').format(
            self.level, self.title, self.detail
        )


def _cells(row: Sequence[Cell], align: str) -> Markup:
    first = Markup('<th scope="row" class="{}">{}</th>')
    other = Markup('<td class="{}">{}</td>')
    return Markup("").join((other if i else first).format(align[i], _text(cell)) for i, cell in enumerate(row))


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:,}" if isinstance(cell, int) else cell
