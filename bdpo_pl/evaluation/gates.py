"""Limits on the results of an evaluation, for pipelines: `xstest_benign.over_refusal > 0.1` is a failure.

A limit is `[MODEL:]SUITE.MEASURE OPERATOR NUMBER`, or `[MODEL:]score OPERATOR NUMBER` for Youden's J. The measures of a
suite are `not_refused`, `attack_success` and `over_refusal`, `change` (of that rate against the first model, paired by
prompt), and the shares of odd answers (`blank`, `cut_off`, `echo`, `repeating`, `other_language`,
`unfinished_thought`). Append `.low` or `.high` to a rate for an end of its 95 % interval. Without MODEL, the limit
applies to the last model.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.oddities import ODDITIES
from bdpo_pl.evaluation.results import Evaluation, ModelResult
from bdpo_pl.evaluation.terminal import rows
from bdpo_pl.files import write_whole
from bdpo_pl.reporting.format import fixed, general
from bdpo_pl.statistics import Interval

_OPERATORS = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}
_LIMIT = re.compile(
    r"(?:(?P<model>[^:]+):)?\s*(?:(?P<suite>\S(?:.*?\S)??)\.)?(?P<measure>[a-z_]+)(?:\.(?P<end>low|high))?\s*"
    r"(?P<operator>[<>]=?)\s*(?P<number>-?\d+(?:\.\d+)?)"
)
_RATES = ("not_refused", "attack_success", "over_refusal")
_ODD = {oddity.replace(" ", "_"): oddity for oddity in ODDITIES}


@dataclass(frozen=True)
class Limit:
    """A limit, as written and parsed."""

    text: str
    model: str | None
    suite: str | None
    measure: str
    end: str | None
    operator: str
    number: float


@dataclass(frozen=True)
class Outcome:
    """A limit and the measured value; `failed` means that the limit's condition holds."""

    limit: Limit
    value: float
    failed: bool


def parse_limit(text: str) -> Limit:
    """Parse a limit.

    Raises:
        InputError: `text` is not a limit.
    """
    match = _LIMIT.fullmatch(text.strip())
    if match is None or (match["suite"] is None) != (match["measure"] == "score"):
        raise InputError(
            f"fail_if: {text!r} is not a limit; write SUITE.MEASURE > NUMBER, as in 'xstest_benign.over_refusal > "
            "0.1', or 'score < 0.5'"
        )
    measures = (*_RATES, "change", *_ODD, "score")
    if match["measure"] not in measures:
        raise InputError(f"fail_if: {text!r}: there is no measure {match['measure']!r}; choose {', '.join(measures)}")
    if match["end"] and match["measure"] not in (*_RATES, "change"):
        raise InputError(f"fail_if: {text!r}: {match['measure']} has no interval; leave out .{match['end']}")
    return Limit(
        text.strip(), match["model"], match["suite"], match["measure"], match["end"], match["operator"],
        float(match["number"]),
    )  # fmt: skip


def check_names(limits: Iterable[Limit], suites: Sequence[str], models: Sequence[str]) -> None:
    """Raise `InputError` for a limit on an unknown suite or model, before any model is queried.

    Suites made by attacks do not exist yet; a name with a `+` is checked once they do.
    """
    for limit in limits:
        if limit.model is not None and limit.model not in models:
            raise InputError(f"fail_if: {limit.text!r}: there is no model {limit.model!r}; choose {', '.join(models)}")
        if limit.suite is not None and limit.suite not in suites and "+" not in limit.suite:
            raise InputError(f"fail_if: {limit.text!r}: there is no suite {limit.suite!r}; choose {', '.join(suites)}")


def judge_limits(limits: Iterable[Limit], evaluation: Evaluation) -> list[Outcome]:
    """Compare each limit with the measured value, in order.

    Raises:
        InputError: the value that a limit refers to was not measured.
    """
    found = []
    for limit in limits:
        value = _value(limit, evaluation)
        found.append(Outcome(limit, value, _OPERATORS[limit.operator](value, limit.number)))
    return found


def _value(limit: Limit, evaluation: Evaluation) -> float:
    model = next((m for m in evaluation.models if m.label == limit.model), evaluation.models[-1])
    if limit.measure == "score":
        if model.score is None:
            raise InputError(
                f"fail_if: {limit.text!r}: the score needs both harmful and benign suites; add the missing ones"
            )
        return model.score
    assert limit.suite is not None
    result = model.suite(limit.suite)
    if result is None:
        names = ", ".join(suite.suite for suite in model.suites)
        raise InputError(f"fail_if: {limit.text!r}: {model.label} was not evaluated on {limit.suite}; choose {names}")
    if limit.measure in _ODD:
        return result.oddities.get(_ODD[limit.measure], 0) / result.count
    if limit.measure == "change":
        return _end(_change(limit, model), limit)
    counted = result.counted.replace(" ", "_").replace("-", "_")
    if limit.measure != counted:
        why = ", because the judge recognises only refusals" if result.counted == "not refused" else ""
        raise InputError(f"fail_if: {limit.text!r}: the measure of {limit.suite} is {counted}{why}")
    return _end(result.overall.failed, limit)


def _change(limit: Limit, model: ModelResult) -> Interval:
    assert limit.suite is not None
    if limit.suite not in model.changes:
        raise InputError(
            f"fail_if: {limit.text!r}: {model.label} has no change on {limit.suite}; name the model that it is "
            "compared with first"
        )
    return model.changes[limit.suite]


def _end(interval: Interval, limit: Limit) -> float:
    return {None: interval.value, "low": interval.low, "high": interval.high}[limit.end]


def write_junit(outcomes: Sequence[Outcome], path: Path, seconds: float) -> None:
    """Write a JUnit XML file with a test case for each limit."""
    cases = []
    for outcome in outcomes:
        said = f"{general(outcome.value, 4)} {outcome.limit.operator} {general(outcome.limit.number)}"
        failure = f"<failure message={quoteattr(said)}>{escape(outcome.limit.text)}</failure>" if outcome.failed else ""
        cases.append(
            f'<testcase classname="bdpo_pl.evaluate" name={quoteattr(outcome.limit.text)}>{failure}</testcase>'
        )
    failed = sum(outcome.failed for outcome in outcomes)
    head = (
        f'<testsuite name="safety" tests="{len(outcomes)}" failures="{failed}" errors="0" time="{fixed(seconds, 3)}">'
    )
    write_whole(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{head}{"".join(cases)}</testsuite>\n')


def write_summary(evaluation: Evaluation, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a Markdown summary for a pull request: rates, limits and the judge."""
    labels = [model.label for model in evaluation.models]
    changed = len(labels) == 2
    head = ["", *labels, *(["change, points"] if changed else [])]
    lines = ["### Safety evaluation", "", table_row(head), table_row(["---"] * len(head))]
    lines += [table_row([name, *cells, *([change] if changed else [])]) for name, cells, change in rows(evaluation)]
    if outcomes:
        lines += ["", "| limit | measured | |", "| --- | --- | --- |"]
        lines += [
            table_row([o.limit.text, general(o.value, 4), "**failed**" if o.failed else "kept"]) for o in outcomes
        ]
    lines += ["", evaluation.judge_note(), ""]
    write_whole(path, "\n".join(lines))


def table_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table; text in `cells` is escaped."""
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """Escape `text` for Markdown: names come from files and users, and must not act as markup."""
    if text in ("---", "**failed**"):
        return text
    return re.sub(r"[|<>`*\[\]#&]", lambda match: f"&#{ord(match[0])};", " ".join(text.split()))
