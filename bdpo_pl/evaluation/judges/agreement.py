"""How far a judge agrees with labels that people gave: a judge's rates are worth no more than that.

`LABELLED_FILE` ships with this: answers written by hand for this project, harmless to read, labelled by their author
alone, half of them meant to be hard. What a judge reaches on it is no estimate of its accuracy on a model's answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bdpo_pl.data.sources import read_records
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges.judge import Exchange, Judge
from bdpo_pl.evaluation.suites.layouts import rename
from bdpo_pl.statistics import wilson

LABELLED_FILE = Path(__file__).parent / "labelled_answers.jsonl"
"""`prompt`, `response`, `label` (refusal or compliance) and `case`, which says what is hard about a row."""

Question = Literal["refused", "unsafe"]
_REFUSED = {
    "refusal": True, "compliance": False, "refused": True, "complied": False,
    # XSTest's own words.
    "2_full_refusal": True, "1_full_compliance": False, "full_refusal": True, "full_compliance": False,
}  # fmt: skip
_PARTLY = ("3_partial_refusal", "partial_refusal", "partial refusal")
_UNSAFE = {"true": True, "false": False, "1": True, "0": False}
UNLABELLED = "no label yet"
_RESAMPLES = 4000


@dataclass(frozen=True)
class Labelled:
    """An exchange and what a person says of it.

    Attributes:
        exchange: request and answer; the answer may be blank.
        positive: it is a refusal, or it is unsafe, whichever is asked.
        case: what kind of row it is; empty if the file does not say.
        place: file and line.
    """

    exchange: Exchange
    positive: bool
    case: str
    place: str


@dataclass(frozen=True)
class Agreement:
    """A judge against labels; the positive class is refusal, or unsafe.

    Attributes:
        question: what was asked.
        hits: positive by label and judge.
        misses: positive by label alone.
        false_alarms: positive by judge alone.
        rejections: positive by neither.
        wrong: places of the rows on which they differ.
        by_case: case → (rows on which they agree, rows).
        kappa_interval: 95 %, by bootstrap over rows; None if kappa is undefined.
        source: whose labels they are.
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
        """How far the judge agrees, in a few words."""
        low, high = self.accuracy_interval
        return (
            f"it agrees with {self.accuracy:.1%} ({100 * low:.1f} to {100 * high:.1f}) of {self.count:,} {self.source}"
        )

    @property
    def count(self) -> int:
        """Rows."""
        return self.hits + self.misses + self.false_alarms + self.rejections

    @property
    def accuracy(self) -> float:
        """Share of rows on which label and judge agree."""
        return (self.hits + self.rejections) / self.count

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 %, Wilson's."""
        return wilson(self.hits + self.rejections, self.count)

    @property
    def precision(self) -> float | None:
        """Share of the judge's positives that are so by label; None if it named none."""
        named = self.hits + self.false_alarms
        return self.hits / named if named else None

    @property
    def recall(self) -> float | None:
        """Share of the positives by label that the judge named; None if there are none."""
        positives = self.hits + self.misses
        return self.hits / positives if positives else None

    @property
    def kappa(self) -> float | None:
        """Agreement beyond chance (Cohen 1960); None if both gave one and the same label to every row."""
        counts = np.array([[self.hits, self.misses, self.false_alarms, self.rejections]])
        value = float(_kappas(counts)[0])
        return None if np.isnan(value) else value


def read_labelled(
    source: str | Path = LABELLED_FILE,
    columns: Mapping[str, str] | None = None,
    left_out: Counter[str] | None = None,
) -> tuple[Question, list[Labelled]]:
    """What a labelled file asks, and its rows.

    Args:
        source: CSV, JSONL or Parquet file with `prompt`, `response`, and `label` (refusal or compliance, or XSTest's
            words for them) or `unsafe` (true or false); `case` or else `model` groups the rows. With both, `label`
            counts.
        columns: our column → yours, as in `{response: completion, label: final_label}`.
        left_out: counts the rows that are left out: partial refusals, which are neither, and rows without a label.

    Raises:
        InputError: a column is missing, or a value is none of these; or there are no rows.
    """
    rows: list[Labelled] = []
    question: Question | None = None
    left_out = Counter() if left_out is None else left_out
    for raw in read_records(str(source)):
        record = rename(raw, columns or {})
        if question is None:
            question = "refused" if "label" in record.fields else "unsafe"
        column, meanings = ("label", _REFUSED) if question == "refused" else ("unsafe", _UNSAFE)
        prompt, response = record.fields.get("prompt"), record.fields.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise InputError(f"{record.place}: a labelled row needs texts in 'prompt' and 'response'; mend the row")
        said = record.fields.get(column)
        value = "" if said is None else str(said).strip().lower()
        if column in record.fields and not value:
            left_out[UNLABELLED] += 1
            continue
        if value in _PARTLY:
            left_out["partial refusals"] += 1
            continue
        positive = meanings.get(value)
        if positive is None:
            raise InputError(
                f"{record.place}: column {column!r} must be {' or '.join(list(meanings)[:2])}, not "
                f"{said!r}. A labelled file has 'label' (refusal or compliance) or 'unsafe' (true "
                "or false)"
            )
        case = record.fields.get("case") or record.fields.get("model")
        rows.append(Labelled(Exchange(prompt, response), positive, str(case or ""), record.place))
    if question is None or not rows:
        why = f" with a label ({left_out[UNLABELLED]} without one)" if left_out[UNLABELLED] else ""
        raise InputError(f"{source}: no rows{why}")
    return question, rows


def measure_agreement(
    judge: Judge, question: Question, rows: Sequence[Labelled], seed: int = 0, source: str = "labelled answers"
) -> Agreement:
    """What `judge` says of `rows`, against their labels.

    Args:
        judge: any that answers the question.
        question: which of a verdict's two fields is compared.
        rows: at least one.
        seed: of the bootstrap.
        source: whose labels they are, as a noun phrase for reports.

    Raises:
        InputError: the judge does not answer the question, or fails.
    """
    verdicts = judge.judge([row.exchange for row in rows])
    said = [getattr(verdict, question) for verdict in verdicts]
    if any(value is None for value in said):
        raise InputError(f"judge {judge.name} does not tell whether an answer is {question}; give labels of its kind")
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
    """Cohen's kappa of each row of (hits, misses, false alarms, rejections); NaN where chance alone would agree."""
    shares = counts / counts.sum(1, keepdims=True)
    hits, misses, alarms, rejections = shares.T
    by_label, by_judge = hits + misses, hits + alarms
    chance = by_label * by_judge + (1 - by_label) * (1 - by_judge)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1.0, (hits + rejections - chance) / (1.0 - chance), np.nan)


def _kappa_interval(counts: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap: rows drawn with replacement leave counts that are multinomial."""
    total = counts.sum()
    values = _kappas(np.random.default_rng(seed).multinomial(total, counts / total, size=_RESAMPLES))
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
