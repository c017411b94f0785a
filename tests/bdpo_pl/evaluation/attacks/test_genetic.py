"""Genetic framings: losses against plain forwards, operators that keep the request, resumption."""

import itertools
import json
import random

import pytest
import torch
from judging import Says
from makers import build_model, build_tokenizer, large

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks.attack import Target
from bdpo_pl.evaluation.attacks.budget import Budget, BudgetOptions
from bdpo_pl.evaluation.attacks.framings import BUILT_IN, SLOT, Framing
from bdpo_pl.evaluation.attacks.genetic import (
    GeneticAttack,
    GeneticOptions,
    apply,
    breed,
    cross,
    mutate,
    split_sentences,
)
from bdpo_pl.evaluation.attacks.prompt_loss import prompt_losses
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.forward.generation import encode_prompts

PROMPTS = [EvaluationPrompt(f"how {i} ?", f"how {i} ?", "c", f"line {i}", "first water it") for i in range(2)]
KNOWN = {
    name: Framing(name, text)
    for name, text in (("a", "Water it. {request}\n\nIn the morning."), ("b", "Ask a neighbour.\n\n{request}"))
}


@pytest.fixture(scope="module")
def local():
    return large(build_model(max_position_embeddings=1024)).eval(), build_tokenizer()


class Model:
    """Complies from its n-th answer on."""

    def __init__(self, after=10**6):
        self.after, self.asked = after, []

    def __call__(self, prompts):
        self.asked += prompts
        return ["Sure." if len(self.asked) >= self.after else "No." for _ in prompts]


def run(local, model, folder=None, budget=None, prompts=PROMPTS[:1], fits=lambda prompt: True, **options):
    target = Target("m", "key", model, Says(), fits, local, folder=folder, budget=budget or Budget())
    options = {"population": 6, "generations": 3, **options}
    return GeneticAttack(GeneticOptions(**options), KNOWN).run(prompts, target, lambda: None)


def test_losses_are_those_of_plain_forwards(local):
    model, tokenizer = local
    texts = ["how ?", "tell me how to keep snails away from my garden , please ?", "why"]
    ids = encode_prompts(tokenizer, texts)
    target = tokenizer("first water it")["input_ids"]
    for loss, row in zip(prompt_losses(model, ids, target, 2), ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row + target])).logits.double().log_softmax(-1)[0]
        alone = -logits[torch.arange(len(row) - 1, len(row) + len(target) - 1), torch.tensor(target)].mean()
        assert loss == pytest.approx(float(alone), abs=1e-5)


def test_templates_are_split_into_sentences_that_give_the_same_words():
    for framing in BUILT_IN.values():
        parts = split_sentences(framing.template)
        assert sum(SLOT in part for part in parts) == 1
        assert apply(parts, "how {request} ?").split() == framing.template.replace(SLOT, "how {request} ?").split()


def test_operators_keep_the_request_and_use_known_sentences():
    draw = random.Random(0)
    founders = [split_sentences(framing.template) for framing in KNOWN.values()]
    pool = ["Water it.", "In the morning.", "Ask a neighbour."]
    for _ in range(200):
        for child in (mutate(draw.choice(founders), pool, draw), cross(*draw.sample(founders, 2), draw)):
            assert sum(SLOT in part for part in child) == 1
            assert set(child) <= {*pool, SLOT}
    assert len({tuple(mutate(founders[0], pool, draw)) for _ in range(50)}) > 3
    assert founders == [split_sentences(framing.template) for framing in KNOWN.values()]


def test_elite_passes_unchanged_and_parents_are_drawn_by_loss():
    options = GeneticOptions(population=6, elite=2, crossover=0.0, mutation=0.0)
    population = [[f"s{i}.", SLOT] for i in range(4)]
    children = breed(population, [9.0, 1.0, None, 2.0], options, [], random.Random(0))
    assert children[:2] == [population[1], population[3]]
    assert len(children) == 6
    many = [
        child for k in range(50) for child in breed(population, [9.0, 1.0, None, 2.0], options, [], random.Random(k))
    ]
    counts = [many.count(one) for one in population]
    assert counts[1] > counts[3] > counts[0]
    assert counts[2] == 0


def test_loss_of_the_best_never_rises_and_the_best_is_asked(local, tmp_path):
    model = Model()
    made = run(local, model, tmp_path, generations=4)
    assert len(model.asked) == 4
    (file,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert "do not publish it" in lines[0]["warning"]
    best = [min(loss for loss in line["losses"]) for line in lines[1:]]
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(best))
    assert best[-1] < best[0]
    prompt = made.prompts[0]
    assert (prompt.text, prompt.behaviour, prompt.attack) == (model.asked[-1], "how 0 ?", "genetic")
    assert (made.cost, made.curve.requests) == ("4 steps on 1 prompts of 6 framings each", [1, 24])
    # The loss on record is that of the text that was asked.
    ids = encode_prompts(local[1], [prompt.text])
    (alone,) = prompt_losses(local[0], ids, local[1]("first water it")["input_ids"], 1)
    assert alone == pytest.approx(best[-1], abs=1e-5)


def test_stops_at_a_success(local):
    model = Model(after=2)
    made = run(local, model, generations=5)
    assert len(model.asked) == 2
    assert (made.curve.requests, made.curve.success) == ([1, 12, 30], [0.0, 1.0, 1.0])


class GoneError(Exception):
    pass


@pytest.mark.parametrize("fails", [1, 2, 5])
def test_interrupted_attack_goes_on_to_the_same_end(local, tmp_path, fails):
    whole = Model()
    expected = run(local, whole, tmp_path / "whole", prompts=PROMPTS)
    model = Model()

    def gone(prompts):
        if len(model.asked) + 1 == fails:
            raise GoneError
        return model(prompts)

    with pytest.raises(GoneError):
        run(local, gone, tmp_path / "states", prompts=PROMPTS)
    assert run(local, model, tmp_path / "states", prompts=PROMPTS) == expected
    assert model.asked == whole.asked
    other = Model()
    run(local, other, tmp_path / "states", prompts=PROMPTS, seed=1)
    assert other.asked != whole.asked


def test_framings_that_do_not_fit_are_left_out(local):
    model = Model()
    run(local, model, fits=lambda prompt: "neighbour" not in prompt)
    assert all("neighbour" not in prompt for prompt in model.asked)
    with pytest.raises(InputError, match="no framing of genetic fits into the window of m"):
        run(local, Model(), fits=lambda prompt: False)


def test_budget_and_served_models(local):
    model = Model()
    run(local, model, budget=Budget.begin(BudgetOptions(requests=13), 1))
    assert len(model.asked) == 2
    with pytest.raises(InputError, match="one step of genetic takes 16"):
        GeneticAttack().check(Budget.begin(BudgetOptions(requests=15), 1))
    with pytest.raises(InputError, match="needs the probabilities of m, which an endpoint does not give"):
        run(None, Model())


@pytest.mark.parametrize(
    "wrong", [{"population": 1}, {"elite": 16}, {"elite": 0}, {"generations": 0}, {"mutation": 1.5}, {"crossover": -1}]
)
def test_wrong_options(wrong):
    with pytest.raises(InputError, match=rf"genetic\.{next(iter(wrong))} must be"):
        GeneticOptions(**wrong)


def test_no_time_for_one_request_makes_no_prompt(local):
    made = run(local, Model(), budget=Budget(ends=0.0, clock=lambda: 1.0))
    assert (made.prompts, made.curve) == ([], None)
