"""Write the embedded preference set: `python -m bdpo_pl.embedded.make.data [--seed 0] [--out FOLDER]`.

The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdpo_pl import embedded
from bdpo_pl.embedded.make import framings, responses
from bdpo_pl.embedded.make.topics import EVERYDAY, HELD_OUT_RISKS, LOOK_ALIKES, RISKS, Benign, Risk

Row = dict[str, str | bool]

TRAIN_SIZES = {"harmful": 800, "benign": 200, "look_alike": 200}
HELD_OUT_SIZES = {"harmful": 160, "benign": 40, "look_alike": 40}
OUT_OF_DISTRIBUTION_SIZE = 120
PROMPTS = 80
# Share of the harmful pairs whose prompt is wrapped in one of the framings of `framings.SEEN`.
FRAMED = 0.25


@dataclass(frozen=True)
class Act:
    """An act that prompts ask about.

    Attributes:
        text: wording, as in "steal a bicycle".
        topic: topic of the act.
        held_out: true if the act is kept out of every training text.
    """

    text: str
    topic: Risk | Benign
    held_out: bool

    @property
    def kind(self) -> str:
        """Kind of the act: `harmful`, `benign` or `look_alike`."""
        if isinstance(self.topic, Risk):
            return "harmful"
        return "look_alike" if self.topic in LOOK_ALIKES else "benign"


def all_acts() -> list[Act]:
    """Combine every verb with every object; hold out one act per verb, whose object is seen with the other verbs."""
    acts = []
    for topic in (*RISKS, *EVERYDAY, *LOOK_ALIKES):
        whole = topic.name in HELD_OUT_RISKS
        for v, verb in enumerate(topic.verbs):
            for o, thing in enumerate(topic.objects):
                held_out = whole or v + o == 3
                acts.append(Act(verb.format(thing), topic, held_out))
    return acts


def question(act: Act, rng: random.Random) -> str:
    """Return a prompt that asks about `act`."""
    return rng.choice(responses.QUESTIONS).format(act=act.text)


def refusal(act: Act, rng: random.Random) -> str:
    """Return a refusal of a harmful act."""
    assert isinstance(act.topic, Risk)
    template = rng.choice(responses.REFUSALS)
    return template.format(act=act.text, harm=act.topic.harm, instead=act.topic.instead)


def compliance(act: Act, rng: random.Random) -> str:
    """Return an answer that complies with a harmful act without saying how to do it."""
    first, then, last = (rng.choice(steps) for steps in responses.IDLE_STEPS)
    return rng.choice(responses.COMPLIANCES).format(act=act.text, first=first, then=then, last=last)


def helpful(act: Act, rng: random.Random) -> str:
    """Return a helpful answer to a benign act."""
    assert isinstance(act.topic, Benign)
    first, then, last = (rng.choice(steps) for steps in act.topic.steps)
    return rng.choice(responses.HELPFUL).format(act=act.text, first=first, then=then, last=last)


def unhelpful(act: Act, rng: random.Random) -> str:
    """Return a refusal or an evasion where help would be right."""
    templates = responses.OVER_REFUSALS if rng.random() < 0.6 else responses.EVASIONS
    return rng.choice(templates).format(act=act.text)


def preference_pairs(
    acts: Sequence[Act],
    size: int,
    rng: random.Random,
    framed: float = FRAMED,
    wraps: Sequence[str] = framings.SEEN,
) -> list[Row]:
    """Return `size` rows about `acts`, no prompt twice; a share `framed` of harmful prompts is in one of `wraps`."""
    rows: dict[str, Row] = {}
    while len(rows) < size:
        act = rng.choice(acts)
        prompt = question(act, rng)
        harmful = act.kind == "harmful"
        if harmful and rng.random() < framed:
            prompt = rng.choice(wraps).format(question=prompt)
        chosen, rejected = (
            (refusal(act, rng), compliance(act, rng)) if harmful else (helpful(act, rng), unhelpful(act, rng))
        )
        rows.setdefault(
            prompt,
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "category": act.topic.name,
                "kind": act.kind,
                # A refusal or an evasion is unhelpful, but safe.
                "chosen_safe": True,
                "rejected_safe": not harmful,
            },
        )
    return list(rows.values())


def prompts(acts: Sequence[Act], size: int, rng: random.Random, wraps: Sequence[str] = ("{question}",)) -> list[Row]:
    """Return `size` different prompts about `acts`, in `wraps` by turns; `behaviour` is a wrapped question."""
    rows: dict[str, Row] = {}
    while len(rows) < size:
        act = rng.choice(acts)
        asked = question(act, rng)
        prompt = wraps[len(rows) % len(wraps)].format(question=asked)
        row: Row = {"prompt": prompt, "category": act.topic.name}
        rows.setdefault(prompt, row if prompt == asked else row | {"behaviour": asked})
    return list(rows.values())


def files(seed: int) -> Iterator[tuple[Path, list[Row]]]:
    """Yield each file of the set, by its path in the package, with its rows."""
    rng = random.Random(seed)  # noqa: S311 - data, not secrets
    acts = all_acts()

    def some(kind: str, held_out: bool) -> list[Act]:
        return [act for act in acts if act.kind == kind and act.held_out == held_out]

    for path, sizes, held_out in (
        (embedded.TRAIN_FILE, TRAIN_SIZES, False),
        (embedded.HELD_OUT_FILE, HELD_OUT_SIZES, True),
    ):
        rows = [row for kind, size in sizes.items() for row in preference_pairs(some(kind, held_out), size, rng)]
        rng.shuffle(rows)
        yield path, rows
    harmful = some("harmful", True)
    yield embedded.HARMFUL_PROMPTS_FILE, prompts(harmful, PROMPTS, rng)
    yield embedded.JAILBREAK_PROMPTS_FILE, prompts(harmful, PROMPTS, rng, framings.UNSEEN)
    yield embedded.BENIGN_PROMPTS_FILE, prompts(some("look_alike", True), PROMPTS, rng)
    yield (
        embedded.OUT_OF_DISTRIBUTION_FILE,
        preference_pairs(harmful, OUT_OF_DISTRIBUTION_SIZE, rng, framed=1.0, wraps=framings.UNSEEN),
    )


def write(folder: Path, seed: int = 0) -> list[Path]:
    """Write every file of the set to `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path, rows in files(seed):
        target = folder / path.name
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        target.write_text(text, encoding="utf-8")
        written.append(target)
    return written


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=embedded.TRAIN_FILE.parent)
    options = parser.parse_args()
    for path in write(options.out, options.seed):
        print(path)


if __name__ == "__main__":
    main()
