"""A plotting area with axes, as inline SVG; colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from bdpo_pl.reporting.format import grouped

WIDTH = 720
_TOP, _RIGHT, _BOTTOM = 8, 18, 46
_LEGEND_ROW, _LEGEND_GAP, _SWATCH = 20, 18, 28
_LONGEST_NAME = 60
_LETTER = 6.6
_LABEL_ROOM = 36
NUM_COLOURS = 6

_MARK_ROW = 13.0


class Frame:
    """A plotting area that converts data coordinates to SVG.

    Args:
        x_range: smallest and largest x.
        y_range: smallest and largest y.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis; "" omits label and ticks, for charts that name their rows themselves.
        height: height in drawing units; the width is `WIDTH`.
        left: width of the margin left of the area.
        legend: names of the series, in the order of their colours.
        percent: label the y axis in percent.
        x_percent: label the x axis in percent.

    Raises:
        ValueError: a range is not finite.
    """

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        x_label: str,
        y_label: str = "",
        *,
        height: int = 300,
        left: int = 64,
        legend: Sequence[str] = (),
        percent: bool = False,
        x_percent: bool = False,
    ) -> None:
        self.x_low, self.x_high = _widened(x_range)
        self.y_low, self.y_high = _widened(y_range)
        y_ticks = ticks(self.y_low, self.y_high, 5, percent) if y_label else []
        # Beside the longest of them there must be room for the label.
        left = max([left, *(_LABEL_ROOM + round(_LETTER * len(label)) for _, label in y_ticks)])
        rows = _legend_rows(legend, WIDTH - _RIGHT - left)
        self.top = _TOP + _LEGEND_ROW * len(rows) + (6 if rows else 0)
        # The requested height is that with one row of the legend.
        self.height = height + _LEGEND_ROW * max(0, len(rows) - 1)
        self.left, self.right, self.bottom = left, WIDTH - _RIGHT, self.height - _BOTTOM
        self._parts: list[Markup] = []
        self._labels: list[tuple[int, float, float]] = []
        self._axes(x_label, ticks(self.x_low, self.x_high, percent=x_percent), y_label, y_ticks)
        self._legend(rows)

    def x(self, value: float) -> float:
        """Return the distance of `value` from the left."""
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Return the distance of `value` from the top."""
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)

    def add(self, template: str, *values: object) -> None:
        """Draw `template` with escaped `values`; numbers are rounded to a tenth of a unit."""
        rounded = (f"{v:.1f}" if isinstance(v, float) else v for v in values)
        self._parts.append(Markup(template).format(*rounded))  # noqa: S704 - a template is code, not data

    def path(self, points: Sequence[tuple[float, float]], css: str, close: bool = False) -> None:
        """Draw a line through `points`, given in drawing units."""
        steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.add('<path class="{}" d="M{}{}"/>', css, steps, "Z" if close else "")

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> None:
        """Draw `text` at a position in drawing units."""
        self.add('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>', x, y, css, anchor, text)

    def mark(self, value: float, label: str) -> None:
        """Draw a dashed vertical line at x = `value`, labelled at its top, or lower if labels would overlap."""
        x = self.x(value)
        self.path([(x, self.top), (x, self.bottom)], "mark")
        width = _LETTER * len(label.strip())
        at_end = width > self.right - x
        start = x - 4.0 - width if at_end else x + 4.0
        row = 0
        while any(r == row and start < end + 4.0 and begin - 4.0 < start + width for r, begin, end in self._labels):
            row += 1
        self._labels.append((row, start, start + width))
        y = self.top + 10.0 + _MARK_ROW * row
        self.text(x + (-4.0 if at_end else 4.0), y, label, "marklabel", "end" if at_end else "start")

    def render(self, description: str) -> Markup:
        """Return the drawing; `description` describes its content in words."""
        return Markup(
            '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">{}</svg>'
        ).format(WIDTH, self.height, description, Markup("").join(self._parts))

    def _axes(
        self, x_label: str, x_ticks: Sequence[tuple[float, str]], y_label: str, y_ticks: Sequence[tuple[float, str]]
    ) -> None:
        for value, label in x_ticks:
            x = self.x(value)
            self.path([(x, self.top), (x, self.bottom)], "grid")
            self.text(x, self.bottom + 16.0, label, "tick", "middle")
        self.text((self.left + self.right) / 2, self.bottom + 36.0, x_label, "label", "middle")
        for value, label in y_ticks:
            y = self.y(value)
            self.path([(self.left, y), (self.right, y)], "grid")
            self.text(self.left - 8.0, y + 4.0, label, "tick", "end")
        if y_label:
            middle = (self.top + self.bottom) / 2
            self.add(
                '<text class="label" text-anchor="middle" transform="translate(14 {}) rotate(-90)">{}</text>',
                middle,
                y_label,
            )
        self.path([(self.left, self.bottom), (self.right, self.bottom)], "axis")

    def _legend(self, rows: Sequence[Sequence[str]]) -> None:
        """Draw the legend of colours and dashes above the area."""
        number = 0
        for k, row in enumerate(rows):
            x, y = float(self.left), _TOP + k * _LEGEND_ROW + 2.0
            for name in row:
                self.add('<rect class="s{} fill" x="{}" y="{}" width="22" height="10"/>', colour(number), x, y)
                self.path([(x, y), (x + 22.0, y)], f"s{colour(number)} line")
                self.text(x + _SWATCH, y + 9.0, name)
                x += _SWATCH + _LETTER * len(name) + _LEGEND_GAP
                number += 1


def colour(index: int) -> int:
    """Return the number of the colour of series `index`, from 1."""
    return index % NUM_COLOURS + 1


def ticks(low: float, high: float, count: int = 7, percent: bool = False) -> list[tuple[float, str]]:
    """Return about `count` round values within [low, high], each with its label."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    shown = step * 100 if percent else step
    decimals = max(0, -math.floor(math.log10(shown) + 1e-9))
    found = []
    for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        value = k * step
        label = f"{grouped(100 * value, decimals)}%" if percent else grouped(value, decimals)
        found.append((value, label))
    return found


def _widened(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = float(bounds[0]), float(bounds[1])
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"an axis from {low} to {high} cannot be drawn")
    # A single value still needs an axis with a positive length.
    return (low, high) if high > low else (low - max(0.5, abs(low) * 0.1), high + max(0.5, abs(high) * 0.1))


def _legend_rows(names: Sequence[str], width: float) -> list[list[str]]:
    """Return `names`, shortened if necessary, in as many rows as they need."""
    rows: list[list[str]] = []
    room = 0.0
    for name in names:
        shown = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
        needed = _SWATCH + _LETTER * len(shown) + _LEGEND_GAP
        if not rows or needed > room:
            rows.append([])
            room = width
        rows[-1].append(shown)
        room -= needed
    return rows
