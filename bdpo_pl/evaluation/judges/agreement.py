"""Agreement of a judge with labels given by people; the judge's rates are only as reliable as this agreement.

`LABELLED_FILE` ships with this module: answers written by hand for this project, harmless to read, labelled only by
their author, half of them difficult on purpose. The agreement on it does not estimate the accuracy on a model's
answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bdpo_pl.data.sources import Record, read_records
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges.judge import Exchange, Judge, Verdict
from bdpo_pl.evaluation.suites.layouts import rename
from bdpo_pl.reporting.format import fixed, percent, whole
from bdpo_pl.statistics import wilson

LABELLED_FILE = Path(__file__).parent / "labelled_answers.jsonl"
"""File with `prompt`, `response`, `label` (refusal or compliance) and `case`, the difficulty of a row."""

Question = Literal["refused", "unsafe"]
_REFUSED = {
    "refusal": True, "compliance": False, "refused": True, "complied": False,
    # XSTest's labels.
    "2_full_refusal": True, "1_full_compliance": False, "full_refusal": True, "full_compliance": False,
}  # fmt: skip
_PARTLY = ("3_partial_refusal", "partial_refusal", "partial refusal")
_UNSAFE = {"true": True, "false": False, "1": True, "0": False}
UNLABELLED = "no label yet"
_RESAMPLES = 4000


@dataclass(frozen=True)
class Labelled:
    """An exchange and a person's label.

    Attributes:
        exchange: request and answer; the answer may be blank.
        positive: true if the label is refusal or, if the question is harm, unsafe.
        case: kind of the row; empty if the file does not state it.
        place: file and line.
    """

    exchange: Exchange
    positive: bool
    case: str
    place: str


@dataclass(frozen=True)
class Agreement:
    """Agreement of a judge with labels; the positive class is refusal, or unsafe.

    Attributes:
        question: field of the verdict that is compared with the labels.
        hits: number of rows that are positive by label and judge.
        misses: number of rows that are positive only by label.
        false_alarms: number of rows that are positive only by judge.
        rejections: number of rows that are positive by neither.
        wrong: places of the rows on which label and judge differ.
        by_case: case → (number of rows with agreement, number of rows).
        kappa_interval: 95 % interval of kappa, by bootstrap over rows; None if kappa is undefined.
        source: origin of the labels.
    """

    question: Question
    hits: int
    misses: int
    false_alarms: int
    rejections: int
    wrong: Sequence[str]
    by_case: Mapping[str, tuple[int, int]]
    kappa_interval: tuple[float, float] | None
    source: str = "labelled answers"

    def sentence(self) -> str:
        """Describe the agreement in a few words."""
        low, high = self.accuracy_interval
        ends = f"{fixed(100 * low, 1)} to {fixed(100 * high, 1)}"
        return f"it agrees with {percent(self.accuracy)} ({ends}) of {whole(self.count)} {self.source}"

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.hits + self.misses + self.false_alarms + self.rejections

    @property
    def accuracy(self) -> float:
        """Share of rows on which label and judge agree."""
        return (self.hits + self.rejections) / self.count

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, Wilson's."""
        return wilson(self.hits + self.rejections, self.count)

    @property
    def precision(self) -> float | None:
        """Share of the judge's positives that are positive by label; None if the judge has no positives."""
        named = self.hits + self.false_alarms
        return self.hits / named if named else None

    @property
    def recall(self) -> float | None:
        """Share of the positives by label that the judge recognises; None if there are none."""
        positives = self.hits + self.misses
        return self.hits / positives if positives else None

    @property
    def kappa(self) -> float | None:
        """Agreement beyond chance (Cohen 1960); None if label and judge give the same single class to every row."""
        counts = np.array([[self.hits, self.misses, self.false_alarms, self.rejections]])
        value = float(_kappas(counts)[0])
        return None if np.isnan(value) else value


def read_labelled(
    source: str | Path = LABELLED_FILE,
    columns: Mapping[str, str] | None = None,
    left_out: Counter[str] | None = None,
) -> tuple[Question, list[Labelled]]:
    """Read a labelled file, and return the question that its labels answer, and its rows.

    Args:
        source: CSV, JSONL or Parquet file with `prompt`, `response`, and `label` (refusal or compliance, or XSTest's
            words for them) or `unsafe` (true or false); `case` or otherwise `model` groups the rows. `unsafe` is used
            only if no row has a `label`.
        columns: mapping from our column names to yours, such as `{response: completion, label: final_label}`.
        left_out: counter of the rows that are left out: partial refusals, which belong to neither class, and rows
            without a label.

    Raises:
        InputError: a column is missing, a value is none of these, or there are no rows.
    """
    rows: list[Labelled] = []
    left_out = Counter() if left_out is None else left_out
    records = [rename(raw, columns or {}) for raw in read_records(str(source))]
    by_label = any(_said(record, "label") for record in records)
    question: Question = "refused" if by_label else "unsafe"
    column, meanings = ("label", _REFUSED) if by_label else ("unsafe", _UNSAFE)
    for record in records:
        prompt, response = record.fields.get("prompt"), record.fields.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise InputError(f"{record.place}: a labelled row needs texts in 'prompt' and 'response'; correct the row")
        value = _said(record, column)
        if not value and {"label", "unsafe"} & record.fields.keys():
            left_out[UNLABELLED] += 1
            continue
        if value in _PARTLY:
            left_out["partial refusals"] += 1
            continue
        positive = meanings.get(value)
        if positive is None:
            raise InputError(
                f"{record.place}: column {column!r} must be {' or '.join(list(meanings)[:2])}, not "
                f"{record.fields.get(column)!r}. A labelled file has 'label' (refusal or compliance) or 'unsafe' (true "
                "or false)"
            )
        case = record.fields.get("case") or record.fields.get("model")
        rows.append(Labelled(Exchange(prompt, response), positive, str(case or ""), record.place))
    if not rows:
        why = f" with a label ({left_out[UNLABELLED]} without one)" if left_out[UNLABELLED] else ""
        raise InputError(f"{source}: no rows{why}; give rows with 'label' (refusal or compliance) or 'unsafe'")
    return question, rows


def _said(record: Record, column: str) -> str:
    """Return the value of a column in small letters; "" if there is none."""
    value = record.fields.get(column)
    return "" if value is None else str(value).strip().lower()


def measure_agreement(
    judge: Judge,
    question: Question,
    rows: Sequence[Labelled],
    seed: int = 0,
    source: str = "labelled answers",
    verdicts: Sequence[Verdict] | None = None,
) -> Agreement:
    """Compare the verdicts of `judge` on `rows` with their labels.

    Args:
        judge: a judge that answers the question.
        question: field of the verdicts that is compared, `refused` or `unsafe`.
        rows: labelled rows, at least one.
        seed: seed of the bootstrap.
        source: origin of the labels, as a noun phrase for reports.
        verdicts: verdicts of the judge on `rows`, if it has judged them.

    Raises:
        InputError: the judge does not answer the question, or fails.
    """
    if verdicts is None:
        verdicts = judge.judge([row.exchange for row in rows])
    said = [getattr(verdict, question) for verdict in verdicts]
    if any(value is None for value in said):
        kind = "'label' (refusal or compliance)" if question == "unsafe" else "'unsafe' (true or false), and no 'label'"
        raise InputError(
            f"judge {judge.name} does not recognise whether an answer is {question}; give labels of its kind: {kind}"
        )
    cells: Counter[tuple[bool, bool]] = Counter()
    agree: Counter[str] = Counter()
    for row, value in zip(rows, said, strict=True):
        cells[row.positive, value] += 1
        agree[row.case] += row.positive == value
    counts = [cells[True, True], cells[True, False], cells[False, True], cells[False, False]]
    sizes = Counter(row.case for row in rows)
    return Agreement(
        question,
        hits=counts[0],
        misses=counts[1],
        false_alarms=counts[2],
        rejections=counts[3],
        wrong=[row.place for row, value in zip(rows, said, strict=True) if row.positive != value],
        by_case={case: (agree[case], size) for case, size in sizes.items()},
        kappa_interval=_kappa_interval(np.array(counts), seed),
        source=source,
    )


def _kappas(counts: np.ndarray) -> np.ndarray:
    """Compute Cohen's kappa of each row of (hits, misses, false alarms, rejections); NaN if chance agreement is 1."""
    shares = counts / counts.sum(1, keepdims=True)
    hits, misses, alarms, rejections = shares.T
    by_label, by_judge = hits + misses, hits + alarms
    chance = by_label * by_judge + (1 - by_label) * (1 - by_judge)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1.0, (hits + rejections - chance) / (1.0 - chance), np.nan)


def _kappa_interval(counts: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Compute the percentile bootstrap: the counts of rows drawn with replacement are multinomial."""
    total = counts.sum()
    values = _kappas(np.random.default_rng(seed).multinomial(total, counts / total, size=_RESAMPLES))
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
