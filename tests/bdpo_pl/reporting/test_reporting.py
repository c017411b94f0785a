"""The report's page and plots: what they draw, that data stays text, and what a real browser says of them."""

import re
import unicodedata
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from browser import Browser
from markupsafe import Markup

from bdpo_pl.reporting import Estimate, Finding, Line, Page, Table, bar_chart, histogram, line_chart, scatter
from bdpo_pl.reporting.svg import Frame, ticks

EVIL = "<script>document.title = 'taken over'</script><img src=http://127.0.0.1:8/x.png onerror=alert(1)>\"'&"


def svg(figure):
    return ET.fromstring(str(figure.svg).replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def full_page(text="plain"):
    page = Page(f"Report {text}", text, {text: text})
    page.warn(text)
    page.headline("12.3%", text)
    page.findings([Finding("problem", text, text), Finding("fine", "nothing else")])
    values = np.random.default_rng(0).normal(size=200)
    section = page.section(text, text)
    section.figure(histogram(text, {text: values, "other": values[:50]}, text, marks={text: 0.5}, caption=text))
    section.figure(bar_chart(text, [text, "b"], {text: [Estimate(0.5, 0.4, 0.6), -0.2], "other": [None, 0.1]}, text))
    section.table(Table([text, "n"], [[text, 1234], ["none", None]], text))
    section = page.section("More")
    section.figure(scatter(text, {text: (values, values), "other": (values[:5], values[:5])}, text, text))
    section.figure(line_chart(text, {text: Line([0, 1], [0.1, 0.3], [0, 0.2], [0.2, 0.4])}, text, text, percent=True))
    section.items([text, text])
    section.quote(text, f"{text}\nsecond line")
    section.folded(text, {text: text})
    return page


def test_browser_shows_the_page_without_complaint_and_asks_for_nothing(tmp_path):
    path = full_page().write(tmp_path / "new" / "report.html")
    with Browser(tmp_path / "profile") as browser:
        wide = browser.visit(path)
        for visit in (wide, browser.visit(path, width=360), browser.visit(path, dark=True, paper=True)):
            assert visit.title == "Report plain"
            assert (visit.complaints, visit.requests, visit.overflow, visit.nameless) == ([], [], 0, 0)
            assert visit.sideways == 0
            assert len(visit.drawings) == 4
            assert all(width > 200 and height > 60 for width, height in visit.drawings)
        assert "1,234" in wide.text


def test_text_of_the_data_stays_text_in_a_browser(tmp_path):
    path = full_page(EVIL).write(tmp_path / "report.html")
    with Browser(tmp_path / "profile") as browser:
        visit = browser.visit(path)
    assert visit.title == f"Report {EVIL}"
    assert visit.text.count("taken over") > 10
    assert (visit.complaints, visit.requests, visit.nameless) == ([], [], 0)


def test_browser_helper_sees_what_is_wrong(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<svg></svg><script>console.error('oh'); lost()</script><img src='http://127.0.0.1:8/x.png'>")
    with Browser(tmp_path / "profile") as browser:
        visit = browser.visit(path)
    assert visit.requests == ["http://127.0.0.1:8/x.png"]
    assert any("lost is not defined" in complaint for complaint in visit.complaints)
    assert "oh" in visit.complaints
    assert visit.nameless == 1


def test_markup_of_the_data_is_escaped_wherever_it_goes():
    html = full_page(EVIL).render()
    assert "<script" not in html
    assert "<img" not in html
    assert EVIL.split(">")[0].removeprefix("<") in Markup(html).unescape()


def test_control_characters_of_the_data_are_shown_as_text(tmp_path):
    """Escape codes, NUL, C1 controls, marks that turn the writing round and lone surrogates, wherever texts go."""
    hostile = "a\x1b[2Jb\x00\x07\x7f\x9b31m\u202ec\u2066\ud800d"
    html = full_page(hostile).write(tmp_path / "report.html").read_text(encoding="utf-8")
    # The browser itself must read them as text again.
    texts = Markup(html).unescape()
    assert {c for c in texts if unicodedata.category(c) in ("Cc", "Cf", "Cs")} == {"\n"}
    shown = r"a\x1b[2Jb\x00\x07\x7f\x9b31m\u202ec\u2066\ud800d"
    # Titles, warnings, findings, tables, texts, quotes; labels of drawings are cut to their room.
    assert html.count(shown) > 25
    assert html.count(r"\x1b[2J") > 35


def test_line_breaks_and_tabs_of_the_data_remain():
    page = Page("p")
    page.section("s").quote("label", "one\n\ttwo")
    assert "<pre>one\n\ttwo</pre>" in page.render()


def test_file_names_no_place_to_fetch_from():
    html = full_page().render()
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#|data:)[^\s\"'>]", html)
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html


def test_histogram_counts_every_value_and_draws_its_share():
    figure = histogram("h", {"a": [0.0, 0.1, 0.9, 1.0], "b": [1.0]}, "x", bins=2)
    assert [row[1:] for row in figure.numbers.rows] == [[2, 0], [2, 1]]
    first, second = [path for path in svg(figure).iter("path") if "fill" in path.get("class")]
    heights = [{float(y) for y in re.findall(r" ([\d.]+)", path.get("d"))} for path in (first, second)]
    base, top = max(heights[1]), min(heights[1])
    assert base - min(heights[0]) == pytest.approx((base - top) / 2, abs=0.2)


def test_histogram_of_one_value_and_of_an_empty_series():
    figure = histogram("h", {"a": [3.0], "b": []}, "x")
    assert sum(row[1] for row in figure.numbers.rows) == 1
    assert "nan" not in str(figure.svg)


def test_bars_start_at_zero_and_reach_their_value():
    figure = bar_chart("b", ["up", "down"], {"s": [Estimate(0.5, 0.25, 0.75), -1.0]}, "x")
    up, down = [rect for rect in svg(figure).iter("rect") if "solid" in rect.get("class")]
    assert float(down.get("x")) + float(down.get("width")) == pytest.approx(float(up.get("x")), abs=0.2)
    assert float(down.get("width")) == pytest.approx(2 * float(up.get("width")), abs=0.3)
    assert [row[1] for row in figure.numbers.rows] == ["0.5 (0.25 to 0.75)", "-1"]


def test_large_scatter_draws_a_sample_and_says_so():
    x = np.arange(5000.0)
    figure = scatter("s", {"a": (x, x)}, "x", "y")
    assert str(figure.svg).count("h0") == 2000
    assert "2,000 of 5,000" in str(figure.svg)


def test_long_legends_wrap_within_the_drawing():
    names = [f"model {i} " + "x" * 45 for i in range(5)] + ["y" * 200]
    figure = bar_chart("b", ["a"], {name: [1.0] for name in names}, "x")
    swatches = [rect for rect in svg(figure).iter("rect") if "fill" in rect.get("class")]
    assert len(swatches) == 6
    assert len({(rect.get("x"), rect.get("y")) for rect in swatches}) == 6
    bars = [float(rect.get("y")) for rect in svg(figure).iter("rect") if "solid" in rect.get("class")]
    assert max(float(rect.get("y")) for rect in swatches) < min(bars)
    assert float(figure.svg.split('viewBox="0 0 720 ')[1].split('"')[0]) > max(bars) + 40


def luminance(colour):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (b / 255 for b in bytes.fromhex(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "paper"])
def test_colours_can_be_told_from_their_ground(scheme):
    """The contrast that WCAG AA asks for: 4.5 for text, 3 for what is drawn."""
    blocks = re.findall(r":root \{(.*?)\}", full_page().render(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): #(\w{3,6})\b", blocks[scheme]))
    colours = {name: c if len(c) == 6 else "".join(2 * x for x in c) for name, c in colours.items()}
    for ground in ("paper", "card"):
        for name, needed in [(n, 4.5) for n in ("ink", "muted", "problem", "notice", "fine", "s1")] + [
            (f"s{i}", 3.0) for i in range(2, 7)
        ]:
            high, low = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= needed, (name, ground)


def test_without_a_browser_the_test_is_skipped_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"), Browser(tmp_path / "profile"):
        pass


def test_line_chart_keeps_the_points():
    figure = line_chart("l", {"a": Line([0, 10], [0.5, 0.25])}, "step", "rate", percent=True)
    assert figure.numbers.rows == [["a", "0", "50.0%"], ["a", "10", "25.0%"]]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: histogram("t", {"a": []}, "x"),
        lambda: bar_chart("t", ["a"], {"s": [None]}, "x"),
        lambda: bar_chart("t", ["a"], {"s": [1.0, 2.0]}, "x"),
        lambda: scatter("t", {"a": ([], [])}, "x", "y"),
        lambda: line_chart("t", {}, "x", "y"),
        lambda: Table(["a", "b"], [["only one"]], "t"),
        lambda: Frame((0.0, float("nan")), (0.0, 1.0), "x"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw):
    with pytest.raises(ValueError, match=r"nothing to plot|but 2 values|but rows of|cannot be drawn"):
        draw()


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-0.013, 0.009, ["−0.010", "−0.005", "0.000", "0.005"]),
        (0.0, 4200.0, ["0", "1,000", "2,000", "3,000", "4,000"]),
    ],
)
def test_ticks_are_round(low, high, labels):
    assert [label for _, label in ticks(low, high)] == labels
    assert all(low <= value <= high for value, _ in ticks(low, high))


def test_a_link_leads_to_a_file_of_any_name():
    page = Page("Runs", "", {})
    page.section("Reports").links({"beta=0.1 #2 50%/report.html": "a <run>"})
    html = page.render()
    assert 'href="beta%3D0.1%20%232%2050%25/report.html"' in html
    assert "a &lt;run&gt;" in html
