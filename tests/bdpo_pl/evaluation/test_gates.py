"""Limits: what is one, what it is compared with, and how the outcome is written."""

from xml.etree import ElementTree

import pytest

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.gates import Limit, Outcome, parse_limit, write_junit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.over_refusal > 0.1", (None, "a", "over_refusal", None, ">", 0.1)),
        ("  before:a.b.not_refused.high>=1 ", ("before", "a.b", "not_refused", "high", ">=", 1.0)),
        ("a+gcg.change.low < -0.05", (None, "a+gcg", "change", "low", "<", -0.05)),
        ("s+t_Scots Gaelic.not_refused > 0.5", (None, "s+t_Scots Gaelic", "not_refused", None, ">", 0.5)),
        ("after: a b.blank.change.low > 0", ("after", "a b.blank", "change", "low", ">", 0.0)),
        ("score <= 0.5", (None, None, "score", None, "<=", 0.5)),
        ("m:score < 0", ("m", None, "score", None, "<", 0.0)),
        ("a.unfinished_thought > 0", (None, "a", "unfinished_thought", None, ">", 0.0)),
    ],
)
def test_limits(text, expected):
    limit = parse_limit(text)
    assert (limit.model, limit.suite, limit.measure, limit.end, limit.operator, limit.number) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a.over_refusal", "is not a limit"),
        ("over_refusal > 0.1", "is not a limit"),
        ("a.score > 0.1", "is not a limit"),
        ("a.over_refusal == 0.1", "is not a limit"),
        ("a.over_refusal > much", "is not a limit"),
        ("a.refusals > 0.1", "there is no measure 'refusals'; choose not_refused"),
        ("a.blank.low > 0.1", "blank has no interval"),
    ],
)
def test_what_is_no_limit(text, fault):
    with pytest.raises(InputError, match=fault):
        parse_limit(text)


def test_junit_holds_hostile_names_as_text(tmp_path):
    text = 'a"<b>&.over_refusal > 0.1'
    outcomes = [Outcome(Limit(text, None, "a", "over_refusal", None, ">", 0.1), 0.25, True)]
    write_junit(outcomes, tmp_path / "limits.xml", 1.5)
    root = ElementTree.parse(tmp_path / "limits.xml").getroot()
    (case,) = root
    assert (case.get("name"), case.find("failure").get("message")) == (text, "0.25 > 0.1")
