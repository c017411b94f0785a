"""Trees of attacks with an attacker, a target and a judge that go by simple rules."""

import json
import re

import pytest

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks.attack import Target
from bdpo_pl.evaluation.attacks.budget import Budget, BudgetOptions
from bdpo_pl.evaluation.attacks.tap import TreeAttack, TreeOptions
from bdpo_pl.evaluation.judges.judge import Judge, Verdict
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt

PROMPTS = [EvaluationPrompt("Framed: how {prompt} ?", "how {prompt} ?", "c", "line 1", attack="fiction")]


class Attacker:
    """Proposes its last prompt with the number of its way after it; calls off the topic what it is told to."""

    name = "attacker"

    def __init__(self, off_topic=lambda prompt: False, unreadable=()):
        self.off_topic, self.unreadable, self.ways, self.proposed = off_topic, set(unreadable), {}, []

    def reply(self, conversations):
        return [self._one(turns) for turns in conversations]

    def _one(self, turns):
        if turns[0]["role"] == "user":
            prompt = turns[0]["content"].partition("The prompt: ")[2]
            assert "The request: how {prompt} ?" in turns[0]["content"]
            return f"<think>\nAre they alike?\n</think>\n\n{'No.' if self.off_topic(prompt) else 'Yes.'}"
        way = self.ways.setdefault(re.search(r"go about it: (.*?) Learn", turns[0]["content"])[1], len(self.ways))
        said = [json.loads(turn["content"])["prompt"] for turn in turns if turn["content"].startswith("{")]
        prompt = f"{said[-1] if said else 'p'}{way}"
        self.proposed.append(prompt)
        return "hm" if prompt in self.unreadable else json.dumps({"improvement": "more", "prompt": prompt})


class Model:
    """Complies with one prompt; the score of the others is the share of ones in them."""

    def __init__(self, yields=""):
        self.yields, self.asked = yields, []

    def __call__(self, prompts):
        self.asked += prompts
        return [f"Sure: {p}" if p == self.yields else f"No: {p}" for p in prompts]


class Ones(Judge):
    name = "ones"

    def judge(self, exchanges):
        self.requests = {exchange.prompt for exchange in exchanges}
        return [
            Verdict(unsafe=e.response.startswith("Sure"), score=e.response.count("1") / len(e.response))
            for e in exchanges
        ]

    def facts(self):
        return {}


def run(attacker, model, folder=None, budget=None, **options):
    target = Target("m", "key", model, Ones(), folder=folder, budget=budget or Budget())
    return TreeAttack(attacker, TreeOptions(**{"retries": 0, **options})).run(PROMPTS, target, lambda: None)


def test_tree_branches_and_the_best_leaves_remain():
    model = Model()
    made = run(Attacker(), model, width=2, branching=3, depth=3)
    first, second, third = model.asked[:3], model.asked[3:9], model.asked[9:]
    assert first == ["p0", "p1", "p2"]
    # The best two are p1, and p0, which came first of those without a one.
    assert second == ["p10", "p11", "p12", "p00", "p01", "p02"]
    assert third == ["p110", "p111", "p112", "p100", "p101", "p102"]
    (prompt,) = made.prompts
    assert (prompt.text, prompt.behaviour, prompt.attack, prompt.category) == ("p111", "how {prompt} ?", "tap", "c")
    assert "3 steps on 1 prompts; 15 queries; 0 proposals of attacker were off the topic" in made.cost
    assert (made.curve.requests, made.curve.success) == ([1, 18], [0.0, 0.0])


def test_tree_stops_at_a_success():
    model = Model("p01")
    made = run(Attacker(), model, width=2, branching=2, depth=5)
    assert made.prompts[0].text == "p01"
    assert len(model.asked) == 6
    assert (made.curve.requests, made.curve.success) == ([1, 6, 20], [0.0, 1.0, 1.0])


def test_what_is_off_the_topic_is_never_asked():
    model = Model()
    made = run(Attacker(off_topic=lambda prompt: prompt.endswith("0")), model, width=2, branching=2, depth=2)
    assert model.asked == ["p1", "p11"]
    assert "2 proposals of attacker were off the topic" in made.cost
    nothing = run(Attacker(off_topic=lambda prompt: True), Model(), width=2, branching=2, depth=2)
    # The request itself, if nothing was asked at all.
    assert nothing.prompts[0].text == "how {prompt} ?"
    assert nothing.curve.success == [0.0, 0.0]


def test_answers_that_cannot_be_read_are_counted():
    model = Model()
    made = run(Attacker(unreadable={"p0"}), model, width=1, branching=2, depth=1, retries=1)
    assert model.asked == ["p1"]
    assert "2 answers could not be read" in made.cost


class GoneError(Exception):
    pass


@pytest.mark.parametrize("part", ["attacker", "model"])
@pytest.mark.parametrize("fails", [1, 2, 3])
def test_interrupted_tree_goes_on_to_the_same_end(tmp_path, part, fails):
    whole = Model()
    expected = run(Attacker(), whole, tmp_path / "whole", width=2, branching=2, depth=3)
    attacker, model, count = Attacker(), Model(), [0]

    def failing(real):
        def fail(given):
            count[0] += 1
            if count[0] == fails:
                raise GoneError
            return real(given)

        return fail

    if part == "attacker":
        attacker.reply = failing(attacker.reply)
    target = failing(model) if part == "model" else model
    folder = tmp_path / "states"
    with pytest.raises(GoneError):
        run(attacker, target, folder, width=2, branching=2, depth=3)
    before = len(model.asked)
    assert run(Attacker(), model, folder, width=2, branching=2, depth=3) == expected
    assert model.asked == whole.asked
    assert len(model.asked) > before
    # An attacker of the same name at another temperature begins anew.
    warmer = Attacker()
    warmer.facts = lambda: {"temperature": "1.0"}
    run(warmer, model, folder, width=2, branching=2, depth=3)
    assert len(model.asked) > len(whole.asked)


def test_budget_limits_the_depth():
    model = Model()
    run(Attacker(), model, budget=Budget.begin(BudgetOptions(requests=9), 1), width=2, branching=2, depth=5)
    assert len(model.asked) == 2 + 4
    with pytest.raises(InputError, match="one step of tap takes 4"):
        TreeAttack(Attacker(), TreeOptions(width=2, branching=2)).check(Budget.begin(BudgetOptions(requests=3), 1))


def test_damaged_state_is_told(tmp_path):
    run(Attacker(), Model(), tmp_path, depth=1)
    (file,) = tmp_path.iterdir()
    head, _ = file.read_text().splitlines()
    file.write_text(f'{head}\n{{"attempts": [{{}}]}}\n')
    with pytest.raises(InputError, match="not the whole state of an attack"):
        run(Attacker(), Model(), tmp_path, depth=1)


@pytest.mark.parametrize("name", ["width", "branching", "depth", "history", "retries"])
def test_wrong_options(name):
    with pytest.raises(InputError, match=rf"tree\.{name} must be at least"):
        TreeOptions(**{name: -1})
