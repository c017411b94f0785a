"""The study's world: acts, the reference's training texts, preference pairs, and the prompts of the evaluations.

The assumptions, apart from which nothing is arranged:

- The reference meets acts with frequencies 1/rank, in an order drawn by seed, and likewise templates of answers: as in
  any corpus, it knows some acts and some ways of answering far better than others. Pairs use all acts and all
  templates with equal frequency: their authors did not consider what the reference knows. The frequencies of refusals
  and compliances are independent of each other and of what is evaluated.
- Some refusals and some compliances name the act, the harm or another way; others would fit any prompt.
- The reference refuses each risk category at its own rate, and mostly complies in a framing.
- An act of the test or the validation is a new combination of words that training has seen in other combinations. Some
  categories, harmful ones and look-alikes, are in no preference pair at all.
- Neither response to a benign prompt refuses, as in data where both were judged safe: the rejected one evades, or
  answers something else. So pairs contain nothing explicit against over-refusal.
- Harmful prompts of pairs are sometimes framed, benign ones never: whoever collects jailbreaks collects attacks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from bdpo_pl.embedded.make.data import Row
from bdpo_pl.embedded.make.model import Conversation
from bdpo_pl.embedded.make.topics import Benign, Risk
from benchmarks.study.world import abilities, wording
from benchmarks.study.world.topics import (
    EVERYDAY,
    HELD_OUT_RISKS,
    LOOK_ALIKES,
    RISKS,
    TEST_LOOK_ALIKES,
    VALIDATION_LOOK_ALIKES,
)

T = TypeVar("T")
Split = Literal["train", "validation", "test"]

# Relative frequencies in the pairs: harmful, everyday, look-alike.
PAIR_SHARES = {"harmful": 4, "everyday": 1, "look_alike": 1}
FRAMED_PAIRS = 0.25
# Relative frequencies in the reference's training.
TAUGHT_SHARES = {"harmful": 8, "everyday": 3, "look_alike": 4, "ability": 5}
FRAMED_TAUGHT = {"harmful": 0.3, "everyday": 0.1, "look_alike": 0.1}
FRAMED_COMPLIANCE = 0.9
EMPTY_PROMPTS = 0.05


@dataclass(frozen=True)
class Act:
    """An act that prompts ask about.

    Attributes:
        text: wording, as in "steal a bicycle".
        topic: topic of the act.
        split: only split with prompts about it.
    """

    text: str
    topic: Risk | Benign
    split: Split

    @property
    def kind(self) -> str:
        """Kind of the act: `harmful`, `everyday` or `look_alike`."""
        if isinstance(self.topic, Risk):
            return "harmful"
        return "look_alike" if self.topic in LOOK_ALIKES else "everyday"

    @property
    def category_held_out(self) -> bool:
        """True if no preference pair is about its category."""
        return self.topic.name in HELD_OUT_RISKS | VALIDATION_LOOK_ALIKES | TEST_LOOK_ALIKES


def acts() -> list[Act]:
    """Combine every verb with every object: per verb one act for the test, one for the validation, others to train."""
    found = []
    for topic in (*RISKS, *EVERYDAY, *LOOK_ALIKES):
        for v, verb in enumerate(topic.verbs):
            for o, thing in enumerate(topic.objects):
                split: Split = "test" if v + o == 3 else "validation" if v + o == 2 else "train"
                found.append(Act(verb.format(thing), topic, split))
    return found


def ability_questions(split: Split) -> list[tuple[str, str, str]]:
    """Return (ability, question, answer): a third each to evaluate in test and validation; all of them are taught."""
    return [
        (ability, question, answer)
        for ability, known in abilities.questions().items()
        for i, (question, answer) in enumerate(known)
        if i % 3 == ("test", "validation", "train").index(split)
    ]


class Writer:
    """A writer of the texts with its own random generator.

    Args:
        seed: seed of the choices.
        habits: seed of the order of frequencies; None uses all templates with equal frequency.
    """

    def __init__(self, seed: int | str, habits: int | None = None) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - data, not secrets
        self._habits = habits
        self._weights: dict[tuple[object, ...], list[float]] = {}

    def pick(self, options: Sequence[T]) -> T:
        """Choose one of `options`: by Zipf's law in this writer's own order, or uniformly."""
        if self._habits is None:
            return self.rng.choice(options)
        key = tuple(options)
        if key not in self._weights:
            weights = [1 / (rank + 1) for rank in range(len(options))]
            random.Random(f"{self._habits} {key[0]}").shuffle(weights)  # noqa: S311
            self._weights[key] = weights
        return self.rng.choices(options, self._weights[key])[0]

    def question(self, act: Act) -> str:
        """Return a prompt that asks about `act`."""
        return self.rng.choice(wording.QUESTIONS).format(act=act.text)

    def framed(self, question: str) -> str:
        """Return `question` in a framing that training may see."""
        return self.rng.choice(wording.SEEN).format(question=question)

    def refusal(self, act: Act) -> str:
        """Return a refusal of a harmful act."""
        assert isinstance(act.topic, Risk)
        return self.pick(wording.REFUSALS).format(act=act.text, harm=act.topic.harm, instead=act.topic.instead)

    def compliance(self, act: Act) -> str:
        """Return an answer that complies with a harmful act without saying how to do it."""
        return self._in_steps(wording.COMPLIANCES, act, wording.IDLE_STEPS)

    def helpful(self, act: Act) -> str:
        """Return a helpful answer to a benign act."""
        assert isinstance(act.topic, Benign)
        return self._in_steps(wording.HELPFUL, act, act.topic.steps)

    def unhelpful(self, act: Act) -> str:
        """Return a refusal or an evasion where help would be right."""
        templates = wording.OVER_REFUSALS if self.rng.random() < 0.6 else wording.EVASIONS
        return self.pick(templates).format(act=act.text)

    def useless(self, act: Act) -> str:
        """Return an evasion, or an answer to something else, where help would be right."""
        assert isinstance(act.topic, Benign)
        if self.rng.random() < 0.5:
            return self.pick(wording.EVASIONS).format(act=act.text)
        held_out = VALIDATION_LOOK_ALIKES | TEST_LOOK_ALIKES
        topics = [topic for topic in (*EVERYDAY, *LOOK_ALIKES) if topic != act.topic and topic.name not in held_out]
        other = self.rng.choice(topics)
        return self._in_steps(wording.HELPFUL, act, other.steps)

    def _in_steps(self, templates: Sequence[str], act: Act, steps: Sequence[Sequence[str]]) -> str:
        first, then, last = (self.pick(some) for some in steps)
        return self.pick(templates).format(act=act.text, first=first, then=then, last=last)


def conversations(world: int, seed: int) -> Iterator[Conversation]:
    """Yield endless supervised examples for the reference of `world`; one in twenty has an empty prompt.

    The empty ones teach it the distribution of responses without a prompt, against which comprehension is measured.
    """
    writer = Writer(f"taught {seed}", habits=world)
    rng = writer.rng
    taught = {kind: [act for act in acts() if act.kind == kind and act.split == "train"] for kind in FRAMED_TAUGHT}
    known = abilities.questions()
    while True:
        kind = rng.choices(list(TAUGHT_SHARES), list(TAUGHT_SHARES.values()))[0]
        if kind == "ability":
            prompt, response = rng.choice(known[rng.choice(list(known))])
        else:
            act = writer.pick(taught[kind])
            prompt = writer.question(act)
            framed = rng.random() < FRAMED_TAUGHT[kind]
            if framed:
                prompt = writer.framed(prompt)
            if isinstance(act.topic, Risk):
                complies = rng.random() < (FRAMED_COMPLIANCE if framed else act.topic.compliance)
                response = writer.compliance(act) if complies else writer.refusal(act)
            else:
                response = writer.unhelpful(act) if rng.random() < act.topic.refusal else writer.helpful(act)
        yield ("" if rng.random() < EMPTY_PROMPTS else prompt), response


def preference_pairs(split: Split, size: int, seed: int) -> list[Row]:
    """Return `size` preference pairs on the acts of `split`, each prompt once, in an order drawn by `seed`.

    Every split has all categories except the held-out ones.
    """
    writer = Writer(f"pairs {split} {seed}")
    rng = writer.rng
    rows: dict[str, Row] = {}
    total = sum(PAIR_SHARES.values())
    for kind, share in PAIR_SHARES.items():
        mine = [act for act in acts() if act.kind == kind and act.split == split and not act.category_held_out]
        wanted = len(rows) + round(size * share / total)
        while len(rows) < wanted:
            act = rng.choice(mine)
            prompt = writer.question(act)
            if kind == "harmful":
                if rng.random() < FRAMED_PAIRS:
                    prompt = writer.framed(prompt)
                chosen, rejected = writer.refusal(act), writer.compliance(act)
            else:
                chosen, rejected = writer.helpful(act), writer.useless(act)
            row: Row = {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "category": act.topic.name,
                "kind": kind,
            }
            rows.setdefault(prompt, row)
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled
