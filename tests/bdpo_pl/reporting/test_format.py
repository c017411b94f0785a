"""Numbers as text."""

import ast
import math
from itertools import pairwise
from pathlib import Path

import pytest

from bdpo_pl.reporting import format
from bdpo_pl.reporting.svg import Frame
from bdpo_pl.statistics import Interval

ROOT = Path(__file__).parents[3] / "bdpo_pl"
BOUNDED, UNBOUNDED = Interval(-0.125, -0.25, -1e-9, 8, 8), Interval(0.5, math.nan, math.nan, 8, 8)
# What shows numbers to a reader. Drawings round their coordinates by themselves.
REPORTS = [
    *sorted({*(ROOT / "reporting").glob("*.py")} - {ROOT / "reporting" / name for name in ("format.py", "svg.py")}),
    *sorted((ROOT / "diagnosis").glob("*.py")), *sorted((ROOT / "evaluation").glob("*.py")),
    *(ROOT / "evaluation" / "judges" / name for name in ("agreement.py", "measuring.py")),
    ROOT / "training" / "summary.py",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (format.signed(-0.004), "0.00"),
        (format.signed(-1.5), "−1.50"),
        (format.signed(None), None),
        (format.signed_percent(0.3333), "+33.3%"),
        (format.plus_minus(0.5, 0.75), "+0.500 ± 0.250"),
        (format.plus_minus(0.5, None), "+0.500"),
        (format.whole(1234567), "1,234,567"),
        (format.grouped(-1234.56, 1), "−1,234.6"),
        (format.fixed(0.5, 3), "0.500"),
        (format.general(0.123456, 2), "0.12"),
        (format.general(2.0), "2"),
        (format.share(0.61251, 0.5, 0.712), "61.3 % (50.0 to 71.2)"),
        (format.points(BOUNDED), "−12.5 (−25.0 to 0.0)"),
        (format.number(BOUNDED), "−0.125 (−0.250 to 0.000)"),
        (format.rate(UNBOUNDED), "50.0 %"),
        (format.number(UNBOUNDED), "0.500"),
        (format.ratio(4.478), "4.48"),
        (format.ratio(12.34), "12.3"),
        (format.ratio(8142.3), "8,142"),
        (format.ratio(2.3e9), "2e9"),
        (format.seconds(59.4), "59 s"),
        (format.seconds(200), "3 min 20 s"),
        (format.seconds(7500), "2 h 05 min"),
        (format.size(512), "512 B"),
        (format.size(13.4e9), "13.4 GB"),
    ],
)
def test_numbers_read_as_people_write_them(text, wanted):
    assert text == wanted


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_reports_leave_the_look_of_numbers_to_one_file(path):
    """So that a rate has the same decimals and the same minus everywhere; a number may be rounded for a computation."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    rounded = {id(x) for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "float"
               for x in ast.walk(node)}  # fmt: skip
    found = [node for node in ast.walk(tree) if id(node) not in rounded and (
        (isinstance(node, ast.FormattedValue) and node.format_spec is not None)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and "{:" in node.value)
    )]  # fmt: skip
    assert not [(node.lineno, ast.unparse(node)) for node in found]


def test_labels_of_near_marks_do_not_overlap():
    frame = Frame((-5.0, 5.0), (0.0, 1.0), "imbalance", "share")
    for value, label in ((-0.1, "strong"), (0.0, "balanced"), (0.1, "strong "), (4.9, "far")):
        frame.mark(value, label)
    spans = sorted(frame._labels)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(spans))
    assert {row for row, _, _ in spans} == {0, 1, 2}
