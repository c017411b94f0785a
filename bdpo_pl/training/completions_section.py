"""The section of a run's report about its sample completions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bdpo_pl.reporting import Cell, Page, Table
from bdpo_pl.reporting.format import fixed, percent, whole
from bdpo_pl.training.completions_file import WARNING, CompletionsFile, Row

_MOST_STEPS = 12
_MOST_PROMPTS = 20


def add_completions(page: Page, rows: Sequence[Row], shows_texts: bool) -> None:
    """Add the section, if there are completions; with texts, the page warns of them.

    Args:
        page: report of the run.
        rows: rows of the completions file.
        shows_texts: include the texts of the first and of the last step.
    """
    if not rows:
        return
    section = page.section("Completions", f"Greedy answers of the policy, all of them in {CompletionsFile.NAME}.")
    body: list[list[Cell]] = []
    for split in dict.fromkeys(row.set for row in rows):
        mine = [row for row in rows if row.set == split]
        steps = sorted({row.step for row in mine})
        at = np.linspace(0, len(steps) - 1, min(_MOST_STEPS, len(steps))).round().astype(int)
        body += [_line(split, steps[i], [row for row in mine if row.step == steps[i]]) for i in at.tolist()]
    # Short, so that a narrow window shows the whole table.
    columns = ["prompts", "step", "n", "tokens", "ended", "refused"]
    section.table(Table(columns, body, "Completions by optimiser step", "lrrrrr"))
    section.text(
        "Tokens: their mean. Ended: the share that ended by themselves, not at the limit. Refused: the share of "
        "refusals, recognised by phrases."
    )
    if not shows_texts:
        section.text("Texts are left out; --completions.show_texts true includes them.")
        return
    page.warn(WARNING)
    for split in dict.fromkeys(row.set for row in rows):
        mine = [row for row in rows if row.set == split]
        for place in list(dict.fromkeys(row.place for row in mine))[:_MOST_PROMPTS]:
            section.folded(f"{split}, {place}", _texts([row for row in mine if row.place == place]))


def _line(split: str, step: int, rows: Sequence[Row]) -> list[Cell]:
    """Return the cells of one line of the table."""
    tokens = [row.num_tokens for row in rows if row.num_tokens is not None]
    finished = [row.finished for row in rows if row.finished is not None]
    refused = [row.refused for row in rows if row.refused is not None]
    return [
        split,
        whole(step),
        whole(len(rows)),
        fixed(sum(tokens) / len(tokens), 1) if tokens else None,
        percent(sum(finished) / len(finished)) if finished else None,
        percent(sum(refused) / len(refused)) if refused else None,
    ]


def _texts(rows: Sequence[Row]) -> dict[str, str]:
    """Return the texts of one prompt by label: prompt, completions at the first and at the last step, references."""
    first, last = rows[0], rows[-1]
    verdict = {None: "", True: ", a refusal", False: ", no refusal"}
    found = {"prompt": last.prompt}
    for row in (first, last) if last.step != first.step else (last,):
        found[f"policy after step {whole(row.step)}{verdict[row.refused]}"] = row.completion
    label = {None: "answer", True: "answer, labelled good", False: "answer, labelled bad"}[last.label]
    given = {"chosen": last.chosen, "rejected": last.rejected, label: last.answer}
    return found | {name: text for name, text in given.items() if text is not None}
