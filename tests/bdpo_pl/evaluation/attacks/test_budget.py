"""Limits of attacks in requests and minutes, and success by number of requests."""

import pytest
from judging import Says

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks.attack import Attack, Attempted, Target, attacked_suite
from bdpo_pl.evaluation.attacks.budget import Budget, BudgetOptions, success_curve
from bdpo_pl.evaluation.attacks.pair import PairAttack, RefinementOptions
from bdpo_pl.evaluation.attacks.pair_prompts import Proposal
from bdpo_pl.evaluation.chat.endpoint import EndpointOptions
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.statistics import wilson


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_every_request_gets_an_equal_share():
    budget = Budget.begin(BudgetOptions(requests=65), 10)
    assert budget.share == 6
    assert [budget.steps(5, each, "pair") for each in (1, 2, 3, 4, 6)] == [5, 3, 2, 1, 1]
    assert Budget.begin(BudgetOptions(), 10).steps(5, 1000, "pair") == 5


def test_budget_that_is_too_small_is_told():
    with pytest.raises(InputError, match=r"budget\.requests of 9 is fewer than the 10 attacked requests"):
        Budget.begin(BudgetOptions(requests=9), 10)
    with pytest.raises(InputError, match=r"leaves 6 for each attacked request, and one step of gcg takes 7"):
        Budget.begin(BudgetOptions(requests=65), 10).steps(5, 7, "gcg")
    for wrong in ({"requests": 0}, {"minutes": 0.0}, {"minutes": float("nan")}):
        with pytest.raises(InputError, match=rf"budget\.{next(iter(wrong))} must be"):
            BudgetOptions(**wrong)


def test_time():
    clock = Clock()
    budget = Budget.begin(BudgetOptions(minutes=2.0), 10, clock)
    clock.now = 219.9
    assert not budget.over()
    clock.now = 220.0
    assert budget.over()
    assert not Budget.begin(BudgetOptions(requests=10), 10, clock).over()


def test_curve():
    curve = success_curve([3, None, 1, 3, None], 6)
    assert curve.requests == [1, 3, 6]
    assert curve.success == [0.2, 0.6, 0.6]
    assert list(zip(curve.low, curve.high, strict=True)) == [wilson(1, 5), wilson(3, 5), wilson(3, 5)]
    assert curve.count == 5
    assert success_curve([None], 4).success == [0.0, 0.0]


# An attack under a budget

PROMPTS = [EvaluationPrompt(f"how {i} ?", f"how {i} ?", place=f"line {i}") for i in range(4)]


class Attacker:
    """Proposes "0", "1", … in each conversation."""

    name = "attacker"

    def reply(self, conversations):
        return [
            Proposal(str(sum(turn["role"] == "assistant" for turn in turns))).to_turn()["content"]
            for turns in conversations
        ]


def attack(budget, respond, folder=None, **options):
    pair = PairAttack(EndpointOptions("http://127.0.0.1:1/v1", "m"), RefinementOptions(**options))
    pair._attacker = Attacker()
    steps = []
    made = pair.run(PROMPTS, Target("m", "key", respond, Says(), folder=folder, budget=budget), lambda: steps.append(1))
    assert len(steps) == len(made.prompts)
    return made


def test_requests_limit_the_steps():
    asked = []

    def respond(prompts):
        asked.extend(prompts)
        return ["No." for _ in prompts]

    made = attack(Budget.begin(BudgetOptions(requests=28), 4), respond, streams=3, steps=5)
    # A share of 7: two steps of three streams.
    assert len(asked) == 24
    assert (made.curve.requests, made.curve.success) == ([1, 6], [0.0, 0.0])


def test_curve_counts_requests_until_the_first_success(tmp_path):
    def respond(prompts):
        return ["Sure." if prompt == "1" else "No." for prompt in prompts]

    made = attack(Budget(), respond, tmp_path, streams=2, steps=3)
    assert (made.curve.requests, made.curve.success) == ([1, 3, 6], [0.0, 1.0, 1.0])
    # From what was saved, without asking again.
    again = attack(Budget(), pytest.fail, tmp_path, streams=2, steps=3)
    assert again == made


def test_time_ends_an_attack_and_what_it_did_not_reach_is_counted():
    clock = Clock()

    def respond(prompts):
        clock.now += 40.0
        return ["No." for _ in prompts]

    made = attack(Budget.begin(BudgetOptions(minutes=1.5), 4, clock), respond, streams=1, steps=2)
    # 40 and 80 s: the first request; 120 s: the second, in whose first step the time ends.
    assert [prompt.behaviour for prompt in made.prompts] == ["how 0 ?", "how 1 ?"]
    suite = attacked_suite(Suite("harm", "harmful", PROMPTS, "file", {"empty": 1}), Named(), made)
    assert (suite.name, suite.dropped) == ("harm+named", {"empty": 1, "not attacked within budget.minutes": 2})
    assert len(suite.prompts) == 2
    over = Budget(ends=0.0, clock=clock)
    nothing = attack(over, pytest.fail)
    assert nothing.curve is None
    with pytest.raises(InputError, match=r"budget\.minutes was over before named had attacked one request"):
        attacked_suite(Suite("harm", "harmful", PROMPTS), Named(), nothing)


class Named(Attack):
    name = "named"

    def run(self, prompts, target, step):
        return Attempted(prompts, "nothing")


def test_own_attacks_need_a_request_each():
    Named().check(Budget.begin(BudgetOptions(requests=4), 4))
    pair = PairAttack(EndpointOptions("http://127.0.0.1:1/v1", "m"))
    with pytest.raises(InputError, match="one step of pair takes 3"):
        pair.check(Budget.begin(BudgetOptions(requests=4), 4))
