"""Categories in the report: those of enough prompts, with their counts."""

from types import SimpleNamespace

from bdpo_pl.evaluation.page import _categories, _counted
from bdpo_pl.reporting import Page
from bdpo_pl.statistics import Interval


def rate(name, count):
    return SimpleNamespace(name=name, failed=Interval(0.5, 0.2, 0.8, count, count))


def test_categories_of_few_prompts_are_folded_and_long_names_keep_their_count():
    names = [("a category with a name that goes on and on", 12), ("fine", 5), ("few", 4), ("fewer", 1)]
    result = SimpleNamespace(suite="s", kind="harmful", counted="not refused", categories=[rate(*n) for n in names])
    model = SimpleNamespace(label="m", suites=[result], suite=lambda name: result)
    page = Page("t")
    _categories(page.section("Categories"), SimpleNamespace(models=[model], judge_note=lambda: "By phrases."))
    html = page.render()
    assert "2 categories of fewer than 5 prompts (5 prompts in all)" in html
    assert "fine (5)" in html
    assert "few (4)" not in html
    assert "… (12)" in html


def test_a_count_stands_at_the_end_of_a_name():
    assert _counted("short", [3, 3]) == "short (3)"
    assert _counted("short", [3, 2]) == "short (3, 2)"
    assert len(_counted("x" * 80, [1234])) == 30
