"""What the report says of changes, and of models with unlike numbers of prompts, from verdicts that were made up."""

import numpy as np
import pytest

from bdpo_pl.evaluation.judges.judge import Verdict
from bdpo_pl.evaluation.measures.ability import Ability
from bdpo_pl.evaluation.measures.overfitting import overfitting
from bdpo_pl.evaluation.measures.rates import compare, compare_p, measure
from bdpo_pl.evaluation.page import build_page, findings
from bdpo_pl.evaluation.results import Evaluation, ModelResult, corrected
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.terminal import rows
from bdpo_pl.evaluation.verdict_log import Judged
from bdpo_pl.statistics import Interval, normal


def suite(count, name="mine"):
    prompts = [EvaluationPrompt(f"q{i}", f"q{i}", "ab"[i % 2], f"line {i}") for i in range(count)]
    return Suite(name, "benign", prompts, "file", {})


def judged(count, refused):
    return [Judged(Verdict(refused=i < refused), 5, True) for i in range(count)]


def model(label, refused, first=None, **more):
    """A model that refuses the first `refused[name]` of so many prompts of each suite, after the model `first`."""
    suites, changes, p_values = [], {}, {}
    for name, (count, failed) in refused.items():
        asked, verdicts = suite(count, name), judged(count, failed)
        suites.append(measure(asked, verdicts))
        if first is not None:
            before = judged(*first[name])
            changes[name], p_values[name] = compare(asked, before, verdicts), compare_p(asked, before, verdicts)
    return ModelResult(label, label, label, suites, None, changes, [], p_values=p_values, **more)


def evaluation(*models):
    return Evaluation({}, {"judge": "phrases"}, None, [], corrected(models), [], [], False)


def told(first, *others):
    models = [model("before", first), *(model(f"m{i}", other, first) for i, other in enumerate(others))]
    return [f.title for f in findings(evaluation(*models)) if "does" in f.title]


@pytest.mark.parametrize("count", [80, 250, 313])
def test_few_prompts_that_changed_are_no_difference_of_two_models(count):
    for flipped in (4, 5):
        assert told({"mine": (count, 0)}, {"mine": (count, flipped)}) == []
        assert told({"mine": (count, flipped)}, {"mine": (count, 0)}) == []
    assert told({"mine": (count, 0)}, {"mine": (count, 6)}) == ["m0 does worse than before on mine."]
    assert told({"mine": (count, 6)}, {"mine": (count, 0)}) == ["m0 does better than before on mine."]


def test_a_difference_is_told_as_by_the_p_value_beside_it():
    # Six of 80: p = 0.031 alone, and 0.062 beside another change.
    first = {"mine": (80, 0), "other": (80, 0)}
    assert told(first, {"mine": (80, 6), "other": (80, 0)}) == []
    assert told(first, {"mine": (80, 7), "other": (80, 0)}) == ["m0 does worse than before on mine."]
    assert told({"mine": (80, 0)}, {"mine": (80, 6)}, {"mine": (80, 0)}) == []


def test_models_with_unlike_numbers_of_prompts_each_show_theirs():
    first, last = (
        model("before", {"pair": (80, 8), "mine": (20, 0)}),
        model("after", {"pair": (72, 0), "mine": (20, 0)}),
    )
    (name, cells, _), (same, others, _) = rows(evaluation(first, last))
    assert name == "over-refusal, pair"
    assert [cell.rpartition(", ")[2] for cell in cells] == ["n = 80", "n = 72"]
    assert same == "over-refusal, mine, n = 20"
    assert not any("n =" in cell for cell in others)
    html = build_page(evaluation(first, last)).render()
    assert "n: pair 80 (before), 72 (after), mine 20." in html
    assert "a (40, 36)" in html
    assert "a (10)" in html
    # An attack that found no prompt for one of the models.
    alone = model("after", {"mine": (20, 0)})
    (name, cells, _), _ = rows(evaluation(first, alone))
    assert (name, cells[1]) == ("over-refusal, pair, n = 80", "–")


def test_an_ability_has_one_form_for_all_models():
    def ability(value, percent):
        return [Ability("task, metric", normal(value, 0.01, 50), percent)]

    for values in ((1.02, 0.98), (0.98, 1.02)):
        models = [model(f"m{v}", {"mine": (5, 1)}, ability=ability(v, v <= 1)) for v in values]
        _, cells, _ = list(rows(evaluation(*models)))[-1]
        assert not any("%" in cell for cell in cells)
    share = Ability("task, acc", Interval(0.5, 0.4, 0.6, 50, 50), True)
    _, cells, _ = list(rows(evaluation(model("m", {"mine": (5, 1)}, ability=[share]))))[-1]
    assert cells == ["50.0 % (40.0 to 60.0)"]


def test_margin_without_an_interval_is_shown_and_written_without_one():
    found = overfitting(
        {"train": np.zeros((2, 1)), "held_out": np.zeros((2, 2))},
        {"train": np.array([[2.0], [1.0]]), "held_out": np.array([[2.0, 3.0], [1.0, 1.0]])},
    )
    made = evaluation(model("m", {"mine": (5, 1)}, overfitting=found))
    cells = {name: cells for name, cells, _ in rows(made)}
    assert cells["margin gap, training − held-out, nats"] == ["-0.500"]
    assert "nan" not in build_page(made).render()
    gap = made.to_json()["models"][0]["overfitting"]["margin_gaps"]["held_out"]
    assert (gap["value"], gap["low"], gap["high"]) == (-0.5, None, None)
