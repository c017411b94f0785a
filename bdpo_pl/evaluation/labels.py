"""Labelled answers by which an evaluation measures its judge."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.evaluation.answering import judge_labelled
from bdpo_pl.evaluation.judges.agreement import (
    LABELLED_FILE,
    Agreement,
    Labelled,
    Question,
    measure_agreement,
    read_labelled,
)
from bdpo_pl.evaluation.judges.judge import Judge
from bdpo_pl.evaluation.judges.learned.refusal_model import LearnedJudge
from bdpo_pl.evaluation.judges.phrases import PhraseJudge
from bdpo_pl.evaluation.options import EvaluateOptions
from bdpo_pl.evaluation.verdict_log import RecordFile
from bdpo_pl.reporting.format import whole


@dataclass(frozen=True)
class Labels:
    """The rows of a labelled file.

    Attributes:
        file: name of the file, for reports.
        whose: origin of the labels, as a noun phrase.
        question: field of a verdict that the labels are compared with.
        rows: the rows.
        left_out: reason for leaving out rows → number of rows.
    """

    file: str
    whose: str
    question: Question
    rows: list[Labelled]
    left_out: Counter[str]

    @classmethod
    def read(cls, options: EvaluateOptions) -> Labels | None:
        """Read the file that `options` name; None if the judge is not measured.

        Raises:
            InputError: the file is faulty.
        """
        file = options.labels or (EMBEDDED if _is_offline(options.judge) else None)
        if file is None:
            return None
        left_out: Counter[str] = Counter()
        if file == EMBEDDED:
            whose = "answers written and labelled by this project, most of them hard on purpose"
            return cls(file, whose, *read_labelled(LABELLED_FILE, None, left_out), left_out)
        whose = f"labels {f'by {options.labels_by} ' if options.labels_by else ''}in {file}"
        return cls(file, whose, *read_labelled(file, options.labels_columns, left_out), left_out)

    def measure(self, judge: Judge, records: RecordFile) -> Agreement:
        """Measure the agreement of `judge`. Rows on which it has no verdict are left out, and counted in `left_out`.

        Raises:
            InputError: the judge does not answer the question, or fails.
        """
        exchanges = [row.exchange for row in self.rows]
        # An offline judge is as fast as its record.
        verdicts = judge.judge(exchanges) if _is_offline(judge) else judge_labelled(judge, exchanges, records)
        known = [(row, verdict) for row, verdict in zip(self.rows, verdicts, strict=True) if verdict is not None]
        if len(known) < len(verdicts):
            self.left_out["without a verdict of the judge"] = len(verdicts) - len(known)
        rows, said = [row for row, _ in known], [verdict for _, verdict in known]
        return measure_agreement(judge, self.question, rows, source=self.whose, verdicts=said)

    def notes(self) -> list[str]:
        """Return what was left out, for reports."""
        return [f"Left out of {self.file}: {whole(count)} {why}." for why, count in self.left_out.items()]


def _is_offline(judge: Judge) -> bool:
    return isinstance(judge, PhraseJudge | LearnedJudge)
