"""Results of an evaluation in a terminal; texts of prompts and answers are never printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table
from rich.text import Text

from bdpo_pl.evaluation.measures.overfitting import Overfitting
from bdpo_pl.evaluation.oddities import ODDITIES
from bdpo_pl.evaluation.results import Evaluation, ModelResult
from bdpo_pl.evaluation.suites.known import KnownSuite
from bdpo_pl.reporting.format import fixed, number, percent, points, rate, share, signed, whole

SPLITS = {"train": "training", "held_out": "held-out", "out_of_distribution": "out-of-distribution"}


def results_table(evaluation: Evaluation) -> Table:
    """Build the table of all results: a row per measure, a column per model and, with two models, the change."""
    models = evaluation.models
    changed = len(models) == 2
    table = Table(
        title="Safety, with 95 % intervals",
        title_justify="left",
        caption=Text(evaluation.judge_note()),
        caption_justify="left",
    )
    table.add_column("", overflow="fold")
    for model in models:
        table.add_column(Text(model.label), justify="right", overflow="fold")
    if changed:
        table.add_column("change", justify="right", overflow="fold")
    for name, cells, change in rows(evaluation):
        table.add_row(Text(name), *(Text(cell) for cell in cells), *([Text(change)] if changed else []))
    return table


def rows(evaluation: Evaluation) -> Iterator[tuple[str, list[str], str]]:
    """Yield (measure, a cell for each model, change from the first model to the second) of the comparison."""
    models = evaluation.models
    for name in dict.fromkeys(result.suite for model in models for result in model.suites):
        found = [model.suite(name) for model in models]
        results = [result for result in found if result is not None]
        alike = len({result.count for result in results}) == 1
        change = models[1].changes.get(name) if len(models) == 2 else None
        # Where a budget of time has stopped an attack, models have got different numbers of its prompts.
        numbers = ["" if r is None or alike else f", n = {whole(r.count)}" for r in found]
        cells = ["–" if r is None else rate(r.overall.failed) + n for r, n in zip(found, numbers, strict=True)]
        measure = f"{results[0].counted}, {name}" + (f", n = {whole(results[0].count)}" if alike else "")
        yield measure, cells, "" if change is None else points(change)
    if any(model.score is not None for model in models):
        cells = ["–" if model.score is None else signed(model.score, 3) for model in models]
        yield "safety − over-refusal (Youden's J)", cells, ""
    for oddity in ODDITIES:
        if any(oddity in model.oddities for model in models):
            yield f"answers: {oddity}", [_odd_share(model, oddity) for model in models], ""
    if any(model.overfitting is not None for model in models):
        yield from _overfitting_rows([model.overfitting for model in models])
    for ability in {a.name: a for model in models for a in model.ability}.values():
        by_model = [next((a for a in model.ability if a.name == ability.name), None) for model in models]
        form = rate if all(a.percent for a in by_model if a is not None) else number
        yield ability.name, ["–" if a is None else form(a.value) for a in by_model], ""


def _odd_share(model: ModelResult, oddity: str) -> str:
    count = model.oddities.get(oddity, 0)
    return f"{whole(count)} of {whole(model.answers)} ({percent(count / model.answers)})"


def weakness_table(evaluation: Evaluation) -> Table:
    """Build the table of the last model's worst categories."""
    model = evaluation.models[-1]
    table = Table(title=Text(f"Weakest categories of {model.label}"), title_justify="left")
    for column in ("category", "suite", "went wrong", "prompts"):
        table.add_column(column, justify="left" if column in ("category", "suite") else "right", overflow="fold")
    for weakness in model.weakest:
        table.add_row(Text(weakness.category), Text(weakness.suite), percent(weakness.rate), str(weakness.prompts))
    return table


def agreement_table(evaluation: Evaluation) -> Table:
    """Build the table of the judge's agreement with labels, and their origin."""
    agreement = evaluation.agreement
    assert agreement is not None
    table = Table(
        title=Text(f"Judge {evaluation.judge.get('judge', '?')} against {whole(agreement.count)} {agreement.source}"),
        title_justify="left",
    )
    for column in ("asked", "agreement", "kappa", "recall", "precision"):
        table.add_column(column, justify="left" if column == "asked" else "right", overflow="fold")
    table.add_row(
        agreement.question,
        share(agreement.accuracy, *agreement.accuracy_interval),
        "–" if agreement.kappa is None else fixed(agreement.kappa, 2),
        *("–" if value is None else percent(value) for value in (agreement.recall, agreement.precision)),
    )  # fmt: skip
    return table


def suites_table(known: Mapping[str, KnownSuite]) -> Table:
    """Build the table of the suites that can be named without a source."""
    table = Table(title="Suites known by name", title_justify="left")
    for column in ("name", "kind", "description", "source"):
        table.add_column(column, overflow="fold")
    for name, suite in known.items():
        table.add_row(name, suite.kind, suite.about, suite.source + (" (gated)" if suite.gated else ""))
    return table


def _overfitting_rows(found: list[Overfitting | None]) -> Iterator[tuple[str, list[str], str]]:
    first = next(overfitting for overfitting in found if overfitting is not None)
    for split, name in SPLITS.items():
        if split in first.splits:
            cells = ["–" if o is None else rate(o.splits[split].accuracy) for o in found]
            yield f"preference accuracy, {name} pairs", cells, ""
    for split in first.margin_gaps:
        cells = ["–" if o is None else number(o.margin_gaps[split]) for o in found]
        yield f"margin gap, training − {SPLITS[split]}, nats", cells, ""
