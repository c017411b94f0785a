"""Figures of the study's page: SVG on white, the same bytes for the same results and the same matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.report.results import (
    ABILITY,
    CHIEF,
    FRAMED_ATTACKS,
    GAP,
    OUTCOMES,
    OVER_REFUSAL,
    REFUSAL,
    Cell,
    Measure,
    Results,
)
from benchmarks.study.report.statistics import Interval, interval
from benchmarks.study.report.tables import Contrast, Group, contrast, number
from benchmarks.study.run.imbalance import STRONG_RATIO, TAUS
from benchmarks.study.run.plan import ALIKE, BDPO, DPO, DPO_ALIKE, HALVES, METHODS, VARIANTS

COLOURS = {DPO.name: "#b35900", BDPO.name: "#00508c"}
INK = "#333333"
QUANTILES = ("q5", "q25", "q50", "q75", "q95")


Figures = dict[str, tuple[str, Callable[[Results], bool], Callable[[Results], Any]]]
"""Description, condition and drawing function of figures, by file name."""


def draw_all(results: Results, folder: Path, figures: Figures | None = None) -> list[str]:
    """Write every figure for which the results have cells.

    Args:
        results: results of the study.
        folder: folder of the figures, created if necessary.
        figures: figures of the page; default: those of the study in a small world.

    Returns:
        Names of the files.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Fixed identifiers and text as text: the same bytes each time, and small files.
    with matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        for name, (_, has, draw) in (FIGURES if figures is None else figures).items():
            if has(results):
                figure = draw(results)
                figure.savefig(
                    folder / name, format="svg", facecolor="white", metadata={"Date": None}, bbox_inches="tight"
                )
                matplotlib.pyplot.close(figure)
                written.append(name)
    return written


def methods_figure(
    results: Results,
    measures: Sequence[Measure] = OUTCOMES,
    order: Sequence[str] = tuple(method.name for method in METHODS),
) -> Any:
    """Plot each method's mean with its interval, and its seeds, one panel per outcome.

    Args:
        results: results of a study, whose final cells are drawn.
        measures: outcomes.
        order: names of the methods from top to bottom; others follow.
    """
    names = results.methods("final", order)
    figure, axes = panels(1, len(measures), 2.3, 0.8 + 0.28 * len(names))
    reference = results.pick("final", "reference")
    for axis, measure in zip(axes[0], measures, strict=True):
        for row, name in enumerate(names):
            values = list(results.series(measure, "final", name).values())
            colour = COLOURS.get(name, INK)
            axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.25, markersize=3, markeredgewidth=0)
            error_bar(axis, interval(values), row, colour, 4, 1.5)
        if reference and math.isfinite(measure.of(reference[0])):
            axis.axvline(measure.of(reference[0]), color=INK, linestyle=":", linewidth=0.8)
        _label(axis, measure, "%")
        label_rows(axis, names if axis is axes[0][0] else None, len(names))
    return figure


def imbalance_figure(results: Results) -> Any:
    """Plot quantiles of c_w − c_l over the pairs, as means over seeds."""
    groups = imbalance_groups(results)
    figure, axes = panels(1, 1, 7.5, 0.9 + 0.32 * len(groups))
    axis = axes[0][0]
    for row, group in enumerate(groups):
        cells = described(group.cells(results))
        low, first, middle, third, high = (
            float(np.mean([cell["imbalance"][name] for cell in cells])) for name in QUANTILES
        )
        axis.plot([low, high], [row, row], color=INK, linewidth=1)
        axis.plot([first, third], [row, row], color=COLOURS[BDPO.name], linewidth=7, solid_capstyle="butt")
        axis.plot([middle], [row], "|", color="white", markersize=8, markeredgewidth=2)
    strong = TAUS[0] * math.log(STRONG_RATIO)
    for place in (-strong, 0, strong):
        axis.axvline(place, color=INK, linestyle="--" if place else ":", linewidth=0.8)
    axis.set_xlabel("comprehension of the chosen − of the rejected, nats per token", fontsize=8)
    label_rows(axis, [group.label for group in groups], len(groups))
    return figure


def halves_figure(results: Results) -> Any:
    """Plot differences between the halves of the pairs."""
    return _forest(results, halves_contrasts(), (REFUSAL, FRAMED_ATTACKS, OVER_REFUSAL, ABILITY, GAP))


def sensitivity_figure(results: Results) -> Any:
    """Plot each variant's difference from B-DPO's chosen setting."""
    return _forest(results, sensitivity_contrasts(results), CHIEF)


def curves_figure(results: Results) -> Any:
    """Plot safety and gap over optimiser steps, with t bands over seeds."""
    groups = curve_groups(results)
    figure, axes = panels(1, len(CHIEF), 2.9, 2.6)
    for axis, measure in zip(axes[0], CHIEF, strict=True):
        for group in groups:
            steps, found = curve(results, group, measure)
            colour = COLOURS.get(group.method, INK)
            style = "--" if group.variant else "-"
            means = [one.mean for one in found]
            axis.plot(steps, means, style, color=colour, label=group.label, marker="o", markersize=2.5)
            # A single seed has no band.
            axis.fill_between(
                steps,
                [one.mean - np.nan_to_num(one.half) for one in found],
                [one.mean + np.nan_to_num(one.half) for one in found],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        reference = [measure.of(cell) for cell in results.pick("final", "reference")]
        if reference and math.isfinite(reference[0]):
            axis.axhline(reference[0], color=INK, linestyle=":", linewidth=0.8, label="reference")
        axis.set_xlabel("optimiser step", fontsize=8)
        axis.set_title(_words(measure, "%"), fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def curve_groups(results: Results) -> list[Group]:
    """Return the groups that have curves: methods as chosen, and DPO with B-DPO's settings."""
    found = [Group(name, "curves", name) for name in results.methods("curves", COLOURS)]
    found.append(Group(DPO_ALIKE, "curves", DPO.name, ALIKE))
    return [group for group in found if group.cells(results)]


def curve(results: Results, group: Group, measure: Measure) -> tuple[list[int], list[Any]]:
    """Return the steps of a group's curves, and at each the mean over the seeds that reached it."""
    by_step: dict[int, list[float]] = {}
    for cell in group.cells(results):
        for point in cell.get("curve", []):
            value = measure.of({"metrics": point})
            if math.isfinite(value):
                by_step.setdefault(point["step"], []).append(value)
    steps = sorted(by_step)
    return steps, [interval(by_step[step]) for step in steps]


def described(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells whose pairs have a known imbalance."""
    return [cell for cell in cells if "imbalance" in cell]


def imbalance_groups(results: Results) -> list[Group]:
    """Return the sets of pairs that DPO was trained on, if the records describe them."""
    groups = [Group("all pairs", "final", DPO.name)]
    groups += [Group(half, "imbalance", DPO.name, half) for half in HALVES]
    groups.append(Group("second world", "replication", DPO.name))
    return [group for group in groups if described(group.cells(results))]


def halves_contrasts() -> list[Contrast]:
    """Return the contrasts between the halves."""
    balanced, imbalanced, either = (Group(half, "imbalance", DPO.name, half) for half in HALVES)
    return [contrast(balanced, imbalanced), contrast(balanced, either), contrast(imbalanced, either)]


def sensitivity_contrasts(results: Results) -> list[Contrast]:
    """Return the contrast of each variant with B-DPO as it was chosen, over the seeds that both have."""
    there = dict.fromkeys(cell["setting"]["variant"] for cell in results.pick("sensitivity"))
    names = [name for name in VARIANTS if name in there] + [name for name in there if name not in VARIANTS]
    chosen = Group(BDPO.name, "final", BDPO.name)
    return [Contrast(name, Group(name, "sensitivity", BDPO.name, name), chosen) for name in names]


def _forest(results: Results, contrasts: Sequence[Contrast], measures: Sequence[Measure]) -> Any:
    figure, axes = panels(1, len(measures), 2.3, 0.8 + 0.28 * len(contrasts))
    for axis, measure in zip(axes[0], measures, strict=True):
        found = [each.of(results, measure) for each in contrasts]
        # Zero differences, and those due to rounding alone, would be drawn as if they were large.
        shown = max(_shown([_reach(one) for one in found if one.count]), 1.0 if measure.percent else 0.1)
        for row, one in enumerate(found):
            if one.count and abs(one.mean) > shown:
                text = number(one.mean, measure.digits, sign=True)
                text, side = (f"{text} →", "right") if one.mean > 0 else (f"← {text}", "left")
                axis.text(math.copysign(shown, one.mean), row, text, ha=side, va="center")
            else:
                error_bar(axis, one, row, INK, 3, 1.2)
        axis.axvline(0, color=INK, linestyle=":", linewidth=0.8)
        axis.set_xlim(-1.05 * shown, 1.05 * shown)
        _label(axis, measure, "points")
        label_rows(axis, [each.label for each in contrasts] if axis is axes[0][0] else None, len(contrasts))
    return figure


def _reach(found: Interval) -> float:
    return abs(found.mean) + float(np.nan_to_num(found.half))


def _shown(reaches: Sequence[float]) -> float:
    """Return the drawn distance from 0: up to the farthest one, unless that alone would flatten the others."""
    *_, second, first = [0.0, 0.0, *sorted(reaches)]
    return second if second and first > 4 * second else first


def error_bar(axis: Any, found: Interval, row: int, colour: str, size: float, width: float) -> None:
    """Plot a mean with its interval, if there is one."""
    if found.count:
        half = [np.nan_to_num(found.half)]
        axis.errorbar([found.mean], [row], xerr=half, fmt="o", color=colour, markersize=size, linewidth=width)


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes, (rows, columns), each of `width` × `height` inches."""
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")


def _words(measure: Measure, unit: str) -> str:
    return f"{measure.head} ({unit})".replace(", ", ",\n", 1) if measure.percent else measure.head


def _label(axis: Any, measure: Measure, unit: str) -> None:
    axis.set_xlabel(_words(measure, unit), fontsize=8)
    axis.locator_params(axis="x", nbins=4)


def label_rows(axis: Any, names: Sequence[str] | None, number: int) -> None:
    """Give an axis `number` rows from top to bottom, with `names` or without."""
    axis.set_yticks(range(number), names if names is not None else [""] * number)
    axis.set_ylim(number - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


FIGURES: Figures = {
    "methods.svg": (
        "Every method's mean with its 95 % interval, its seeds as faint dots, the reference as a dotted line",
        lambda results: bool(results.methods("final", [])),
        methods_figure,
    ),
    "imbalance.svg": (
        "Imbalance of comprehension over the pairs, means over seeds: 5 and 95 % (line), 25 and 75 % (bar), median "
        "(gap); outside the dashed lines a pair is strongly re-weighted at τ 0.25",
        lambda results: bool(imbalance_groups(results)),
        imbalance_figure,
    ),
    "halves.svg": (
        "Differences between DPO on the halves of the pairs, with 95 % intervals",
        lambda results: bool(results.pick("imbalance")),
        halves_figure,
    ),
    "curves.svg": (
        "Safety and gap over optimiser steps, means with 95 % bands, the reference as a dotted line",
        lambda results: any(cell.get("curve") for cell in results.pick("curves")),
        curves_figure,
    ),
    "sensitivity.svg": (
        "Differences of B-DPO's variants from what it has chosen, with 95 % intervals; an arrow: beyond the axis",
        lambda results: bool(results.pick("sensitivity")),
        sensitivity_figure,
    ),
}
