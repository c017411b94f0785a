"""Measure the offline judges on labelled answers: `python -m bdpo_pl.evaluation.judges.measuring FILE ...`.

Prints a Markdown table for each file: agreement, Cohen's κ, recall and precision with 95 % intervals, over all rows and
by case or answering model if the file states one. Labels of harm are compared with "not refused", the best prediction
that a judge of refusals can make; this does not measure it as a judge of refusals.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from bdpo_pl.console import get_console
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges.agreement import Agreement, Labelled, Question, measure_agreement, read_labelled
from bdpo_pl.evaluation.judges.judge import Exchange, Judge, Verdict
from bdpo_pl.evaluation.judges.learned.refusal_model import LearnedJudge
from bdpo_pl.evaluation.judges.phrases import PhraseJudge
from bdpo_pl.reporting.format import fixed, share, with_ends
from bdpo_pl.statistics import wilson

JUDGES: tuple[Callable[[], Judge], ...] = (PhraseJudge, LearnedJudge)


class NotRefused(Judge):
    """A judge of refusals used as a judge of harm: every answer that is not refused counts as unsafe."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.name = judge.name

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return the other judge's verdicts, with a guess at harm."""
        return [Verdict(verdict.refused, not verdict.refused) for verdict in self._judge.judge(exchanges)]

    def facts(self) -> dict[str, str]:
        """Return the other judge's facts."""
        return dict(self._judge.facts())


def main(files: Sequence[str]) -> None:
    """Print a table for each file, or the help.

    Raises:
        InputError: there is no file, or one cannot be read as labelled answers.
    """
    if {"-h", "--help"} & set(files):
        print(__doc__)
        return
    if not files:
        raise InputError("give one or more files of labelled answers, such as those of evaluate's --labels")
    for file in files:
        question, rows = read_labelled(file)
        asked = "refused" if question == "refused" else "unsafe (by the judges: not refused)"
        get_console().print(f"\n{file}: {len(rows)} answers, asked whether each is {asked}\n", markup=False)
        head = ("answers", "judge", "n", "agreement", "κ", "recall", "precision")
        for line in (head, ["---"] * len(head), *_lines(question, rows)):
            print(f"| {' | '.join(line)} |")


def _lines(question: Question, rows: Sequence[Labelled]) -> Iterator[list[str]]:
    cases = list(dict.fromkeys(row.case for row in rows))
    groups = {"all": rows} | ({c or "other": [r for r in rows if r.case == c] for c in cases} if len(cases) > 1 else {})
    for name, group in groups.items():
        for make in JUDGES:
            judge = make() if question == "refused" else NotRefused(make())
            found = measure_agreement(judge, question, group)
            yield [name, judge.name, str(found.count), *cells(found)]


def cells(found: Agreement) -> list[str]:
    """Format agreement, κ, recall and precision, each with its interval."""
    kappa = "–" if found.kappa is None else fixed(found.kappa, 2)
    if found.kappa is not None and found.kappa_interval is not None:
        kappa = with_ends(lambda value: fixed(value, 2), found.kappa, *found.kappa_interval)
    return [
        _share(found.hits + found.rejections, found.count),
        kappa,
        _share(found.hits, found.hits + found.misses),
        _share(found.hits, found.hits + found.false_alarms),
    ]


def _share(part: int, whole: int) -> str:
    if not whole:
        return "–"
    return share(part / whole, *wilson(part, whole))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
