"""Genetic framings, in the manner of AutoDAN (Liu et al., arXiv:2310.04451): framings recombined for each request.

A population of framings, made of the sentences of the known ones, is bred for a low loss of an answer that begins with
compliance. After each generation the model answers the best one, and the attack ends when the judge calls that a
success. The operators are those of the paper on whole sentences; its synonyms from a language model are left out. The
attack needs the model's probabilities, and so a model that is loaded here.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bdpo_pl.errors import InputError, require_at_least
from bdpo_pl.evaluation.attacks.attack import (
    Attack,
    AttackResult,
    Attempted,
    StateFile,
    Target,
    attack_each,
    attacked,
    steps_of,
    succeeded,
)
from bdpo_pl.evaluation.attacks.budget import Budget
from bdpo_pl.evaluation.attacks.framings import BUILT_IN, SLOT, Framing
from bdpo_pl.evaluation.attacks.pair import attempted
from bdpo_pl.evaluation.attacks.prompt_loss import prompt_losses
from bdpo_pl.evaluation.attacks.targets import default_target
from bdpo_pl.evaluation.judges.judge import Exchange
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.forward.equivalence import evaluating
from bdpo_pl.forward.generation import encode_prompts
from bdpo_pl.models.loading import num_positions

NAME = "genetic"
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+")
_MOST_SENTENCES = 12


@dataclass
class GeneticOptions:
    """Size of the population and number of generations.

    Args:
        population: number of framings in a generation.
        generations: maximum number of generations for each request.
        elite: number of the best framings that pass unchanged into the next generation.
        crossover: probability that a child has two parents.
        mutation: probability that a child is changed by one sentence.
        batch_size: number of framings in a forward pass; lower it if memory runs out.
        seed: seed of all draws.

    Raises:
        InputError: a value is out of range.
    """

    population: int = 16
    generations: int = 10
    elite: int = 2
    crossover: float = 0.5
    mutation: float = 0.5
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least("genetic", self, population=2, generations=1, elite=1, batch_size=1)
        if self.elite >= self.population:
            raise InputError(f"genetic.elite must be below genetic.population, got {self.elite} of {self.population}")
        for name in ("crossover", "mutation"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"genetic.{name} must be between 0 and 1, got {getattr(self, name)}")


Individual = list[str]
"""The sentences of a framing; exactly one contains `{request}`."""


@dataclass(frozen=True)
class _Generation:
    """A generation as it was measured, and the answer to its best framing."""

    population: list[Individual]
    losses: list[float | None]
    response: str
    success: bool

    @property
    def best(self) -> int:
        return min(range(len(self.losses)), key=lambda i: _finite(self.losses[i]))


class GeneticAttack(Attack):
    """Genetic framings on a model that is loaded here.

    Args:
        options: size of the search.
        known: framings that the first generation is made of; those that transform the request are not used.
    """

    name = NAME

    def __init__(
        self, options: GeneticOptions | None = None, known: Mapping[str, Framing] | None = None
    ) -> None:  # fmt: skip
        self._options = options or GeneticOptions()
        plain = [f for f in (BUILT_IN if known is None else known).values() if f.transform is None]
        self._founders = [split_sentences(framing.template) for framing in plain]
        self._pool = sorted({text for framing in self._founders for text in framing if SLOT not in text})

    def check(self, budget: Budget) -> None:
        """Raise `InputError` if `budget` does not suffice for one generation."""
        self._generations(budget)

    def _generations(self, budget: Budget) -> int:
        return budget.steps(self._options.generations, self._options.population, NAME)

    def run(self, prompts: Sequence[EvaluationPrompt], target: Target, step: Callable[[], None]) -> Attempted:
        """Breed a framing for each request.

        Raises:
            InputError: the model is behind an endpoint, the judge fails, or a state file is damaged.
        """
        if target.local is None:
            raise InputError(
                f"{NAME} needs the probabilities of {target.name}, which an endpoint does not give; leave it out"
            )
        limit = self._generations(target.budget)
        options = replace(self._options, generations=limit)
        with evaluating(target.local[0]):
            found = attack_each(
                prompts,
                target,
                NAME,
                lambda prompt: self._facts(prompt, target, options),
                lambda prompt, file: self._run(prompt, target, options, file),
                step,
            )
        cost = f"{steps_of(found)} of {options.population} framings each"
        return attempted(found, cost, limit * options.population)

    def _run(
        self, prompt: EvaluationPrompt, target: Target, options: GeneticOptions, file: StateFile | None
    ) -> AttackResult:
        generations = _read(file)
        while len(generations) < options.generations and not any(g.success for g in generations):
            if generations and target.budget.over():
                break
            draw = _draws(options.seed, prompt.behaviour, len(generations))
            if generations:
                population = breed(generations[-1].population, generations[-1].losses, options, self._pool, draw)
            else:
                population = self._first(options.population, draw)
            generations.append(self._measured(prompt, population, target, options))
            if file is not None:
                file.write([asdict(generation) for generation in generations])
        # The last one succeeded, or has the lowest loss, because the elite is carried over.
        last = generations[-1]
        text = apply(last.population[last.best], prompt.behaviour)
        details = {
            "framing": last.population[last.best],
            "loss": last.losses[last.best],
            "response": last.response,
            "succeeded": last.success,
            "first_success": len(generations) * options.population if last.success else None,
        }
        return AttackResult(attacked(prompt, text, NAME, alone=True), len(generations), details)

    def _first(self, size: int, draw: random.Random) -> list[Individual]:
        """Return the founders and, if there are too few, mutants of them."""
        founders = draw.sample(self._founders, min(size, len(self._founders)))
        mutants = [mutate(draw.choice(self._founders), self._pool, draw) for _ in range(size - len(founders))]
        return [*founders, *mutants]

    def _measured(
        self, prompt: EvaluationPrompt, population: list[Individual], target: Target, options: GeneticOptions
    ) -> _Generation:
        assert target.local is not None
        model, tokenizer = target.local
        texts = [apply(individual, prompt.behaviour) for individual in population]
        wanted = tokenizer(
            prompt.target or default_target(prompt.behaviour), add_special_tokens=False, verbose=False
        )["input_ids"]  # fmt: skip
        ids = encode_prompts(tokenizer, texts, use_template=target.use_template)
        window = num_positions(model.config)
        fitting = [
            i
            for i, text in enumerate(texts)
            if target.fits(text) and (window is None or len(ids[i]) + len(wanted) <= window)
        ]
        if not fitting:
            raise InputError(f"{prompt.place}: no framing of {NAME} fits into the window of {target.name}")
        losses: list[float | None] = [None] * len(population)
        found = prompt_losses(model, [ids[i] for i in fitting], wanted, options.batch_size)
        for i, loss in zip(fitting, found, strict=True):
            losses[i] = loss if math.isfinite(loss) else None
        if all(loss is None for loss in losses):
            raise InputError(f"{prompt.place}: the model's losses are not finite; load it in float32 or bfloat16")
        best = min(fitting, key=lambda i: _finite(losses[i]))
        (response,) = target.respond([texts[best]])
        (verdict,) = target.judge.judge([Exchange(prompt.behaviour, response)])
        return _Generation(population, losses, response, succeeded(verdict, response))

    def _facts(self, prompt: EvaluationPrompt, target: Target, options: GeneticOptions) -> dict[str, Any]:
        founders = json.dumps(self._founders).encode()
        chosen = {name: value for name, value in asdict(options).items() if name != "batch_size"}
        return {
            "request": prompt.behaviour,
            "wanted": prompt.target or default_target(prompt.behaviour),
            "target": target.key,
            "framings": hashlib.sha256(founders).hexdigest()[:16],
            "judge": {"name": target.judge.name, **target.judge.facts()},
            "options": chosen,
        }


def split_sentences(template: str) -> Individual:
    """Split a template into sentences; the one with the request stays whole."""
    return [part.strip() for part in _SENTENCE_END.split(template) if part.strip()]


def apply(individual: Individual, request: str) -> str:
    """Return the prompt of a framing, with the request in a paragraph of its own."""
    parts = [f"\n\n{text.replace(SLOT, request)}\n\n" if SLOT in text else text for text in individual]
    return re.sub(r" *\n\n *", "\n\n", " ".join(parts)).strip()


def breed(
    population: Sequence[Individual],
    losses: Sequence[float | None],
    options: GeneticOptions,
    pool: Sequence[str],
    draw: random.Random,
) -> list[Individual]:
    """Return the next generation: the elite, and children of parents drawn by their losses.

    Args:
        population: the framings of this generation.
        losses: loss of each; None for one that is not usable.
        options: size and probabilities.
        pool: sentences for mutations.
        draw: source of randomness.
    """
    order = sorted(range(len(population)), key=lambda i: _finite(losses[i]))
    lowest = _finite(losses[order[0]])
    weights = [math.exp(lowest - _finite(loss)) for loss in losses]
    children: list[Individual] = [list(population[i]) for i in order[: options.elite]]
    while len(children) < options.population:
        first, second = draw.choices(population, weights, k=2)
        child = cross(first, second, draw) if draw.random() < options.crossover else list(first)
        children.append(mutate(child, pool, draw) if draw.random() < options.mutation else child)
    return children


def cross(first: Individual, second: Individual, draw: random.Random) -> Individual:
    """Return a framing with the text before the request from one parent and after it from the other, cut at random."""
    at, other = _slot(first), _slot(second)
    before = first[draw.randint(0, at) : at]
    after = second[other + 1 : draw.randint(other + 1, len(second))]
    return [*before, first[at], *after]


def mutate(individual: Individual, pool: Sequence[str], draw: random.Random) -> Individual:
    """Return a framing with one sentence added, left out or moved; the request always stays."""
    rest = [text for text in individual if SLOT not in text]
    request = individual[_slot(individual)]
    way = draw.choice(("add", "drop", "move"))
    if way == "add" and pool and len(individual) < _MOST_SENTENCES:
        changed = list(individual)
        changed.insert(draw.randint(0, len(changed)), draw.choice(pool))
        return changed
    if way == "drop" and rest:
        left_out = draw.randrange(len(rest))
        kept = iter(text for i, text in enumerate(rest) if i != left_out)
        return [text for text in (t if SLOT in t else next(kept, None) for t in individual) if text is not None]
    draw.shuffle(rest)
    rest.insert(draw.randint(0, len(rest)), request)
    return rest


def _slot(individual: Individual) -> int:
    return next(i for i, text in enumerate(individual) if SLOT in text)


def _finite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _draws(seed: int, request: str, generation: int) -> random.Random:
    """Return a random generator that depends only on the arguments, so that a resumed attack makes the same draws."""
    digest = hashlib.sha256(f"{seed}|{generation}|{request}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8]))  # noqa: S311 - no secret


def _read(file: StateFile | None) -> list[_Generation]:
    if file is None:
        return []
    try:
        return [_Generation(**line) for line in file.read()]
    except TypeError:
        raise file.damaged() from None
