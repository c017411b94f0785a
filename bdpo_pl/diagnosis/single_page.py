"""The diagnosis of single answers as a table in the terminal and as an HTML report."""

from __future__ import annotations

from rich.table import Table as TerminalTable
from rich.text import Text

from bdpo_pl.data.held_out import called
from bdpo_pl.diagnosis.estimators import MEANINGS
from bdpo_pl.diagnosis.findings import rounded_down, rounded_up
from bdpo_pl.diagnosis.single import LARGEST_BALANCE, MEASURES, LabelBalance, SingleDiagnosis
from bdpo_pl.reporting import Cell, Finding, Page, Table
from bdpo_pl.reporting.format import fixed, general, number, percent, whole

_HOW_TO_READ = (
    "KTO weighs good and bad answers by λ_D and λ_U; its paper (arXiv:2402.01306) asks for λ_D·n_D / (λ_U·n_U) "
    "between 1 and 4/3.",
    "Intervals are ± 1.96 standard errors of a mean or of a difference, with every answer taken as independent, and "
    "left out for fewer than 10 answers of a label.",
    "What compares two responses to a prompt is not measured: imbalance, balance weights, τ, swapped pairs."
    " Options about these are refused.",
)


def findings(diagnosis: SingleDiagnosis) -> list[Finding]:
    """Return what the reader should know first."""
    found = [_balance(diagnosis.balance)]
    for name, split in diagnosis.splits.items():
        if split.contradicted:
            of = percent(split.contradicted / (split.good + split.bad))
            found.append(
                Finding("problem", f"{whole(split.contradicted)} {called(name)} answers ({of}) have both labels.",
                        "The same answer to the same prompt is labelled good and bad.")
            )  # fmt: skip
        if split.shared_prompts:
            found.append(
                Finding("notice", f"{whole(split.shared_prompts)} {called(name)} answers have a training prompt.",
                        "What is measured on them is no measure of new prompts.")
            )  # fmt: skip
    return [*found, *(Finding("notice", note) for note in diagnosis.notes)]


def single_table(diagnosis: SingleDiagnosis) -> TerminalTable:
    """Return the means by label, for a terminal."""
    unit = f", {diagnosis.unit}" if diagnosis.unit else ""
    table = TerminalTable(title=Text(f"Single answers by label; comprehension{unit}"), title_justify="left")
    table.caption, table.caption_justify = "95 % intervals of the means", "left"
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column != "" else "left", overflow="fold")
    for row in _rows(diagnosis):
        table.add_row(*(Text("–" if cell is None else str(cell)) for cell in row))
    return table


def single_page(diagnosis: SingleDiagnosis) -> Page:
    """Build the report."""
    page = Page("Diagnosis before training", "How this model rates these labelled answers.", diagnosis.facts)
    balance = diagnosis.balance
    page.headline(whole(balance.good), "good training answers")
    page.headline(whole(balance.bad), "bad training answers")
    if balance.value is not None:
        page.headline(fixed(balance.value, 2), "balance of labels, λ_D·n_D / (λ_U·n_U)")
    page.findings(findings(diagnosis))
    section = page.section("Answers by label")
    section.table(Table(list(_COLUMNS), _rows(diagnosis), "Means with 95 % intervals", "llrrr"))
    rows: list[list[Cell]] = [
        [called(name), split.good, split.bad, split.repeated, split.contradicted, split.shared_prompts]
        for name, split in diagnosis.splits.items()
    ]
    columns = ["answers", "good", "bad", "repeated", "with both labels", "with a training prompt"]
    page.section("Consistency").table(Table(columns, rows, "Numbers of answers"))
    page.section("How to read this").items([MEANINGS[diagnosis.estimator].explained("answer"), *_HOW_TO_READ])
    return page


_COLUMNS = ("answers", "measure", "good", "bad", "good − bad")


def _rows(diagnosis: SingleDiagnosis) -> list[list[Cell]]:
    return [
        [called(name), label, *(number(found[key]) if key in found else None for key in _COLUMNS[2:])]
        for name, split in diagnosis.splits.items()
        for measure, label in MEASURES.items()
        for found in [split.means[measure]]
    ]


def _balance(balance: LabelBalance) -> Finding:
    numbers = f"{whole(balance.good)} good and {whole(balance.bad)} bad training answers"
    if not balance.good or not balance.bad:
        return Finding("problem", f"There are {numbers}.", "KTO needs both labels.")
    low, high = balance.low, balance.high
    if balance.value is None or low is None or high is None:
        if balance.value:
            return Finding(
                "fine", f"The labels are balanced: {numbers}.", f"λ_D·n_D / (λ_U·n_U) is {fixed(balance.value, 2)}."
            )
        return Finding("notice", f"One label has no weight; there are {numbers}.", "KTO learns from the other alone.")
    return Finding(
        "notice",
        f"The labels are not balanced: {numbers}.",
        f"λ_D·n_D / (λ_U·n_U) is {fixed(balance.value, 2)}, and KTO's paper asks for 1 to {fixed(LARGEST_BALANCE, 2)}: "
        f"set --model.loss.{balance.option} to a value from {general(rounded_up(low, 3))} to "
        f"{general(rounded_down(high, 3))}.",
    )
