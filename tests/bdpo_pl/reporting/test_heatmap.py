"""Shares as a heat map: cells, shades, texts, and its look on wide and narrow screens."""

import re
from xml.etree import ElementTree

import pytest
from browser import Browser

from bdpo_pl.reporting import Estimate, Page, heat_map

EVIL = "<script>document.title='taken'</script><img src=http://127.0.0.1:8/x.png>"
SVG = "{http://www.w3.org/2000/svg}"


def cells(figure):
    root = ElementTree.fromstring(str(figure.svg))
    return [
        (rect.find(f"{SVG}title").text, float(re.search(r"fill-opacity: ([\d.]+)", rect.get("style"))[1]))
        for rect in root.iter(f"{SVG}rect")
    ]


def test_cells_are_darker_where_the_share_is_larger():
    shares = {"before": [Estimate(0.5, 0.25, 0.75), None], "after": [Estimate(1.0), Estimate(0.0)]}
    figure = heat_map("Rates", ["fraud", "theft"], shares, "share")
    assert cells(figure) == [
        ("fraud, before: 50.0% (25.0% to 75.0%)", 0.3),
        ("theft, before: –", 0.0),
        ("fraud, after: 100.0%", 0.6),
        ("theft, after: 0.0%", 0.0),
    ]
    assert figure.numbers.rows == [
        ["fraud", "50.0% (25.0% to 75.0%)", "100.0%"],
        ["theft", "–", "0.0%"],
    ]
    texts = [text.text for text in ElementTree.fromstring(str(figure.svg)).iter(f"{SVG}text")]
    assert texts == ["before", "50%", "–", "after", "100%", "0%", "fraud", "theft"]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"a": [None]}, "nothing to draw"),
        ({"a": [Estimate(1.5)]}, "between 0 and 1"),
        ({"a": [Estimate(float("nan"))]}, "between 0 and 1"),
        ({"a": []}, "1 labels, but 0 values of a"),
    ],
)
def test_faults(shares, said):
    with pytest.raises(ValueError, match=said):
        heat_map("Rates", ["fraud"], shares, "share")


def test_six_models_in_a_browser(tmp_path):
    names = [f"model {i} {EVIL}" for i in range(6)]
    shares = {name: [Estimate((i + k) % 6 / 5, 0.0, 1.0) for k in range(8)] for i, name in enumerate(names)}
    page = Page("Heat map")
    labels = [f"category {k} {EVIL}" for k in range(8)]
    page.section("Categories").figure(heat_map(f"Rates {EVIL}", labels, shares, "share", caption=EVIL))
    path = page.write(tmp_path / "report.html")
    with Browser(tmp_path / "profile") as browser:
        for width, dark in ((1200, False), (420, True)):
            visit = browser.visit(path, width=width, dark=dark)
            assert visit.title == "Heat map"
            assert (visit.complaints, visit.requests, visit.overflow, visit.nameless) == ([], [], 0, 0)
            assert visit.sideways == 0
            ((drawn, height),) = visit.drawings
            assert 320 < drawn < width
            assert height > 100
            assert "model 5" in visit.text
            assert "40%" in visit.text
