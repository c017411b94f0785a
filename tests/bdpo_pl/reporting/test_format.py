"""Numbers as text."""

from itertools import pairwise

import pytest

from bdpo_pl.reporting import format
from bdpo_pl.reporting.svg import Frame


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (format.signed(-0.004), "0.00"),
        (format.signed(-1.5), "−1.50"),
        (format.signed(None), None),
        (format.signed_percent(0.3333), "+33.3%"),
        (format.plus_minus(0.5, 0.75), "+0.500 ± 0.250"),
        (format.plus_minus(0.5, None), "+0.500"),
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


def test_labels_of_near_marks_do_not_overlap():
    frame = Frame((-5.0, 5.0), (0.0, 1.0), "imbalance", "share")
    for value, label in ((-0.1, "strong"), (0.0, "balanced"), (0.1, "strong "), (4.9, "far")):
        frame.mark(value, label)
    spans = sorted(frame._labels)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(spans))
    assert {row for row, _, _ in spans} == {0, 1, 2}
