"""A table of shares, drawn with cells that are darker where the share is larger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from bdpo_pl.reporting.elements import Cell, Figure, Table
from bdpo_pl.reporting.format import fixed, percent
from bdpo_pl.reporting.plots import Estimate, described
from bdpo_pl.reporting.svg import WIDTH

_TOP, _ROW, _GAP, _RIGHT = 24.0, 24.0, 2.0, 6.0
_LABEL_LETTERS = 30
_LETTER = 6.6
_HEAD_LETTER = 7.6
# The darkest cell leaves its number readable on light and dark paper.
_DARKEST = 0.6


def heat_map(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[Estimate | None]],
    what: str,
    *,
    caption: str = "",
) -> Figure:
    """Draw shares, one row per label and one column per series.

    Args:
        title: title of the figure.
        labels: labels of the rows.
        series: shares by name, one for each label; None: no share.
        what: name of the shares.
        caption: text below the figure.

    Raises:
        ValueError: there are no shares, or one is below 0 or above 1, or the length of a series is not that of
            `labels`.
    """
    for name, values in series.items():
        if len(values) != len(labels):
            raise ValueError(f"{title}: {len(labels)} labels, but {len(values)} values of {name}")
    known = [value for values in series.values() for value in values if value is not None]
    if not known:
        raise ValueError(f"{title}: nothing to draw")
    if not all(0.0 <= value.value <= 1.0 for value in known):
        raise ValueError(f"{title}: shares are between 0 and 1")
    left = 24.0 + _LETTER * min(_LABEL_LETTERS, max(map(len, labels)))
    width = (WIDTH - _RIGHT - left) / len(series)
    parts: list[Markup] = []
    rows: list[list[Cell]] = [[label] for label in labels]
    for column, (name, values) in enumerate(series.items()):
        x = left + column * width
        head = _shortened(name, int(width / _HEAD_LETTER))
        parts.append(_text(x + width / 2, _TOP - 8.0, head, "middle"))
        for row, (label, value) in enumerate(zip(labels, values, strict=True)):
            y = _TOP + row * _ROW
            text = described(value, percent=True)
            rows[row].append(text)
            shade = 0.0 if value is None else _DARKEST * value.value
            parts.append(
                Markup(
                    '<rect class="s2 solid" style="fill-opacity: {}" x="{}" y="{}" width="{}" height="{}">'
                    "<title>{}, {}: {}</title></rect>"
                ).format(
                    fixed(shade, 3),
                    fixed(x, 1),
                    fixed(y, 1),
                    fixed(width - _GAP, 1),
                    fixed(_ROW - _GAP, 1),
                    label,
                    name,
                    text,
                )
            )
            shown = "–" if value is None else percent(value.value, 0)
            parts.append(_text(x + (width - _GAP) / 2, y + _ROW / 2 + 3.5, shown, "middle"))
    for row, label in enumerate(labels):
        parts.append(_text(left - 8.0, _TOP + row * _ROW + _ROW / 2 + 3.5, _shortened(label, _LABEL_LETTERS), "end"))
    height = _TOP + _ROW * len(labels) + _GAP
    drawing = Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">{}</svg>'
    ).format(
        WIDTH,
        fixed(height, 1),
        f"Heat map of {what} for {len(labels)} rows and {len(series)} columns; the numbers follow as a table.",
        Markup("").join(parts),
    )
    return Figure(title, drawing, Table([what, *series], rows, title), caption)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="row" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        fixed(x, 1), fixed(y, 1), anchor, text
    )


def _shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"
