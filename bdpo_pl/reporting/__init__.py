"""Reports as one self-contained HTML file: no network, no script, no font; for light and dark screens and paper.

    page = Page("Safety of two models", "Before and after alignment", facts={"model": name})
    page.warn("This file holds responses of a model that may be harmful.")
    page.findings([Finding("problem", "Three held-out prompts are in train.", "The gap looks too small.")])
    section = page.section("Refusals", "Share of prompts refused, with 95 % intervals.")
    section.figure(bar_chart("Refusal rate", ["harmful", "benign"], {"before": [...], "after": [...]}, "refusals"))
    section.table(Table(["suite", "before", "after"], [["harmful", "30.0 %", "61.3 %"]], "Refusal rates"))
    page.write(Path("report.html"))

Plots: `histogram`, `bar_chart` (with intervals), `heat_map`, `scatter`, `line_chart`; each returns a `Figure` with
    its numbers as a table. Every text is treated as data and escaped; only `markupsafe.Markup` is treated as markup.
"""

from bdpo_pl.reporting.elements import Cell, Figure, Finding, Level, Table
from bdpo_pl.reporting.heatmap import heat_map
from bdpo_pl.reporting.page import Page, Section
from bdpo_pl.reporting.plots import Estimate, Line, bar_chart, histogram, line_chart, scatter

__all__ = [
    "Cell",
    "Estimate",
    "Figure",
    "Finding",
    "Level",
    "Line",
    "Page",
    "Section",
    "Table",
    "bar_chart",
    "heat_map",
    "histogram",
    "line_chart",
    "scatter",
]
