"""Plots of the reports. Each is a pure function of its numbers; series differ in colour, dash and fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from bdpo_pl.reporting.elements import Cell, Figure, Table
from bdpo_pl.reporting.format import fixed, general, whole, with_ends
from bdpo_pl.reporting.format import percent as in_percent
from bdpo_pl.reporting.svg import Frame, colour

_MAX_POINTS = 2000
_LABEL_LETTERS = 30
_ROW_HEIGHT = 17


class Estimate(NamedTuple):
    """A value with its interval, or without one."""

    value: float
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """Points of a line, and optionally an interval around each."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def histogram(
    title: str,
    series: Mapping[str, Sequence[float] | np.ndarray],
    x_label: str,
    *,
    bins: int = 40,
    marks: Mapping[str, float] | None = None,
    caption: str = "",
    unit: str = "pairs",
) -> Figure:
    """Plot the distribution of the values of one or several series, in percent of each series.

    Args:
        title: title of the figure.
        series: values by name, all finite; a series may be empty.
        x_label: name of the values, with their unit.
        bins: number of bins, of equal width and the same for all series.
        marks: positions of dashed vertical lines, by label.
        caption: text below the figure.
        unit: name of the counted things.

    Raises:
        ValueError: there are no values.
    """
    values = {name: np.asarray(v, dtype=np.float64) for name, v in series.items()}
    if not any(len(v) for v in values.values()):
        raise ValueError(f"{title}: nothing to plot")
    everything = np.concatenate([*values.values(), np.array(list((marks or {}).values()))])
    counts = {}
    edges = np.histogram_bin_edges(everything, bins)
    for name, v in values.items():
        counts[name], _ = np.histogram(v, edges)
    shares = {name: c / max(1, len(values[name])) for name, c in counts.items()}
    frame = Frame(
        (edges[0], edges[-1]), (0.0, 1.1 * max(s.max() for s in shares.values())), x_label, f"share of {unit}",
        percent=True, legend=[f"{name} ({whole(len(v))} {unit})" for name, v in values.items()],
    )  # fmt: skip
    for i, share in enumerate(shares.values()):
        steps = [(frame.x(edges[0]), frame.y(0.0))]
        for k, height in enumerate(share):
            steps += [(frame.x(edges[k]), frame.y(height)), (frame.x(edges[k + 1]), frame.y(height))]
        steps.append((frame.x(edges[-1]), frame.y(0.0)))
        frame.path(steps, f"s{colour(i)} fill")
        frame.path(steps, f"s{colour(i)} line")
    for label, x in (marks or {}).items():
        frame.mark(x, label)
    rows: list[list[Cell]] = []
    for k in range(len(edges) - 1):
        span = f"{general(edges[k], 3)} to {general(edges[k + 1], 3)}"
        in_bin = [int(c[k]) for c in counts.values()]
        rows.append([span, *in_bin])
        # As high as the whole column, so that the pointer also finds low bars.
        x, width = frame.x(edges[k]), frame.x(edges[k + 1]) - frame.x(edges[k])
        shown = ", ".join(f"{name} {whole(n)}" for name, n in zip(counts, in_bin, strict=True))
        frame.add('<rect class="hit" x="{}" y="{}" width="{}" height="{}"><title>{}: {}</title></rect>',
                  float(x), frame.top, float(width), frame.bottom - frame.top, span, shown)  # fmt: skip
    medians = "; ".join(f"median of {name} {general(np.median(v), 3)}" for name, v in values.items() if len(v))
    table = Table([x_label, *counts], rows, f"{title}: {unit} in each bin")
    return Figure(title, frame.render(f"Histogram of {x_label}. {medians}."), table, caption)


def bar_chart(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[Estimate | float | None]],
    x_label: str,
    *,
    percent: bool = False,
    limits: tuple[float, float] | None = None,
    caption: str = "",
) -> Figure:
    """Plot horizontal bars, one group per label and one bar per series, with intervals as whiskers.

    Args:
        title: title of the figure.
        labels: labels of the groups.
        series: values by name, one for each label: an `Estimate`, a number, or None for no value.
        x_label: name of the values, with their unit.
        percent: show the values as shares in percent.
        limits: fixed limits of the axis, such as (0, 1) for shares. Default: chosen from the data.
        caption: text below the figure.

    Raises:
        ValueError: there are no values, or the length of a series is not that of `labels`.
    """
    bars = {name: [_estimate(v) for v in values] for name, values in series.items()}
    for name, values in bars.items():
        if len(values) != len(labels):
            raise ValueError(f"{title}: {len(labels)} labels, but {len(values)} values of {name}")
    ends = [e for values in bars.values() for bar in values if bar for e in bar if e is not None]
    if not ends:
        raise ValueError(f"{title}: nothing to plot")
    low, high = limits or (min(0.0, *ends), max(0.0, *ends))
    pad = 0.0 if limits else 0.04 * (high - low)
    group = _ROW_HEIGHT * len(bars) + 10
    legend = list(bars) if len(bars) > 1 else []
    left = 24 + round(6.6 * min(_LABEL_LETTERS, max(map(len, labels))))
    frame = Frame(
        (low - pad if low < 0 else low, high + pad if high > 0 else high), (0.0, 1.0), x_label,
        height=80 + group * len(labels), left=left, legend=legend, x_percent=percent,
    )  # fmt: skip
    rows = []
    for g, label in enumerate(labels):
        at = frame.top + g * group + 5.0
        short = label if len(label) <= _LABEL_LETTERS else label[: _LABEL_LETTERS - 1] + "…"
        frame.text(left - 8.0, at + (group - 10) / 2 + 4.0, short, "row", "end")
        row = [label]
        for i, values in enumerate(bars.values()):
            row.append(described(values[g], percent))
            if values[g] is not None:
                _bar(frame, values[g], at + i * _ROW_HEIGHT, i, f"{label}, {list(bars)[i]}: {row[-1]}")
        rows.append(row)
    frame.path([(frame.x(0.0), frame.top), (frame.x(0.0), frame.bottom)], "axis")
    description = f"Bar chart of {x_label} for {len(labels)} groups; the numbers follow as a table."
    return Figure(title, frame.render(description), Table([x_label, *bars], rows, title), caption)


def scatter(
    title: str,
    series: Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]],
    x_label: str,
    y_label: str,
    *,
    caption: str = "",
) -> Figure:
    """Plot points of one or several series. A large series is sampled at random; the legend counts the sample.

    Args:
        title: title of the figure.
        series: pairs (x, y) of coordinates, by name.
        x_label: name of the x values, with their unit.
        y_label: name of the y values, with their unit.
        caption: text below the figure.

    Raises:
        ValueError: there are no points.
    """
    points = {
        name: (np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for name, (x, y) in series.items()
    }
    if not any(len(x) for x, _ in points.values()):
        raise ValueError(f"{title}: nothing to plot")
    xs, ys = (np.concatenate([p[axis] for p in points.values()]) for axis in (0, 1))
    names = [f"{name} ({_counted(len(x))})" for name, (x, _) in points.items()]
    frame = Frame(_span(xs), _span(ys), x_label, y_label, height=340, legend=names)
    for i, (x, y) in enumerate(points.values()):
        kept = np.arange(len(x))
        if len(x) > _MAX_POINTS:
            kept = np.random.default_rng(0).choice(len(x), _MAX_POINTS, replace=False)
        # A zero-length line with a round cap is a dot, with a tenth of the markup of a circle.
        dots = "".join(f"M{fixed(frame.x(x[k]), 1)} {fixed(frame.y(y[k]), 1)}h0" for k in kept)
        frame.add('<path class="s{} dots" d="{}"/>', colour(i), dots)
    return Figure(title, frame.render(f"Scatter plot of {y_label} against {x_label}."), caption=caption)


def line_chart(
    title: str,
    series: Mapping[str, Line],
    x_label: str,
    y_label: str,
    *,
    percent: bool = False,
    caption: str = "",
) -> Figure:
    """Plot lines of one or several series, with their intervals as bands.

    Args:
        title: title of the figure.
        series: lines by name.
        x_label: name of the x values, with their unit.
        y_label: name of the y values, with their unit.
        percent: show the y values as shares in percent.
        caption: text below the figure.

    Raises:
        ValueError: there are no points.
    """
    if not any(len(line.x) for line in series.values()):
        raise ValueError(f"{title}: nothing to plot")
    xs = np.concatenate([np.asarray(line.x, dtype=np.float64) for line in series.values()])
    ys = np.concatenate(
        [np.asarray(v, dtype=np.float64) for line in series.values() for v in line[1:] if v is not None]
    )
    frame = Frame(_span(xs, 0.02), _span(ys), x_label, y_label, percent=percent, legend=list(series))
    rows = []
    for i, (name, line) in enumerate(series.items()):
        places = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
        if line.low is not None and line.high is not None:
            band = [*zip(line.x, line.high, strict=True), *reversed(list(zip(line.x, line.low, strict=True)))]
            frame.path([(frame.x(x), frame.y(y)) for x, y in band], f"s{colour(i)} fill")
        frame.path(places, f"s{colour(i)} line")
        for k, (x, y) in enumerate(places):
            bounds = (line.low[k], line.high[k]) if line.low is not None and line.high is not None else (None, None)
            shown = described(Estimate(line.y[k], *bounds), percent)
            frame.add('<circle class="s{} dot" cx="{}" cy="{}" r="3"><title>{}, {}: {}</title></circle>',
                      colour(i), float(x), float(y), name, general(line.x[k]), shown)  # fmt: skip
            rows.append([name, general(line.x[k]), shown])
    table = Table(["series", x_label, y_label], rows, title)
    return Figure(title, frame.render(f"Line chart of {y_label} against {x_label}."), table, caption)


def _bar(frame: Frame, bar: Estimate | None, top: float, index: int, shown: str) -> None:
    assert bar is not None
    start, end = sorted((frame.x(0.0), frame.x(bar.value)))
    frame.add('<rect class="s{} solid" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>',
              colour(index), float(start), top, max(1.0, float(end - start)), _ROW_HEIGHT - 3.0, shown)  # fmt: skip
    if bar.low is not None and bar.high is not None:
        middle = top + (_ROW_HEIGHT - 3) / 2
        low, high = frame.x(bar.low), frame.x(bar.high)
        frame.path([(low, middle), (high, middle)], "whisker")
        for x in (low, high):
            frame.path([(x, middle - 4), (x, middle + 4)], "whisker")


def _estimate(value: Estimate | float | None) -> Estimate | None:
    return value if value is None or isinstance(value, Estimate) else Estimate(float(value))


def described(bar: Estimate | None, percent: bool) -> str:
    """Return an estimate with its interval, as text; a dash if there is none."""
    if bar is None:
        return "–"
    form = in_percent if percent else partial(general, digits=3)
    if bar.low is None or bar.high is None:
        return form(bar.value)
    return with_ends(form, bar.value, bar.low, bar.high)


def _counted(number: int) -> str:
    return whole(number) if number <= _MAX_POINTS else f"{whole(_MAX_POINTS)} of {whole(number)}"


def _span(values: np.ndarray, margin: float = 0.04) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return low - margin * (high - low), high + margin * (high - low)
