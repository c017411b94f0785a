"""What attacks share: what they find, and how they keep what they have found so far."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges.judge import Judge
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.files import try_writing, write_whole

WARNING = (
    "Written by an attack on a language model's safety. It holds harmful requests and may hold harmful answers: do not "
    "publish it, and delete it when you are done with it."
)

Progress = Callable[[int, int], None]
"""Told after each prompt: how many are done, and how many there are."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack made of one prompt.

    Attributes:
        prompt: as attacked.
        steps: taken.
        details: of the attack, as JSON values.
    """

    prompt: EvaluationPrompt
    steps: int
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """The model that is attacked, and what an attack may use.

    Attributes:
        name: as in reports.
        key: what identifies it and how it is asked: the state of another is not used.
        respond: prompts → its answers, in order.
        judge: tells whether an answer is what the attack wants.
        fits: whether a prompt and an answer fit into its window.
        local: (model, tokenizer), for attacks that need gradients or tokens; None behind an endpoint.
        use_template: whether prompts are put into the chat template.
        folder: where an attack may keep what it has found, under a warning; None: nowhere.
    """

    name: str
    key: str
    respond: Callable[[Sequence[str]], list[str]]
    judge: Judge
    fits: Callable[[str], bool] = lambda prompt: True
    local: tuple[Any, Any] | None = None
    use_template: bool = True
    folder: Path | None = None


class Attack(ABC):
    """Makes of harmful requests what a given model may not refuse.

    Attributes:
        name: as in options and reports.
    """

    name: str

    @abstractmethod
    def run(self, prompts: Sequence[EvaluationPrompt], target: Target, step: Callable[[], None]) -> Attempted:
        """Attack one prompt after the other.

        Args:
            prompts: bare requests.
            target: the model.
            step: to be called after each prompt.

        Raises:
            InputError: the attack cannot be made on this target, or something it asks fails.
        """


@dataclass(frozen=True)
class Attempted:
    """What an attack came to: its prompts in the order of the requests, and what it cost, in a few words."""

    prompts: Sequence[EvaluationPrompt]
    cost: str


def attacked_suite(suite: Suite, attack: Attack, made: Attempted) -> Suite:
    """The suite of the prompts that `attack` made of `suite`."""
    return replace(suite, name=f"{suite.name}+{attack.name}", prompts=list(made.prompts))


def steps_of(results: Sequence[AttackResult]) -> str:
    """Steps that were taken, in words."""
    return f"{sum(result.steps for result in results):,} steps on {len(results)} prompts"


def attacked(prompt: EvaluationPrompt, text: str, attack: str, *, alone: bool = False) -> EvaluationPrompt:
    """`prompt` with the text that `attack` made of it.

    Args:
        prompt: which may bear an earlier attack's name.
        text: the user's turn now.
        attack: its name.
        alone: it was made of the bare request, and nothing of an earlier attack is left.
    """
    earlier = "" if alone or not prompt.attack else f"{prompt.attack}+"
    return replace(prompt, text=text, attack=earlier + attack)


class StateFile:
    """What an attack on one prompt has found so far: JSON values, a line each, the first one saying what the file is.

    The name is a digest of everything that the attack depends on, so that another model or option never meets this
    state. It is written anew each time and renamed, so that it is always whole.

    Args:
        folder: where it lies.
        attack: its name.
        facts: what the attack depends on, as JSON values; written into the first line.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, attack: str, facts: Mapping[str, Any]) -> None:
        self._head = {"warning": WARNING, "attack": attack, **facts}
        digest = hashlib.sha256(json.dumps(self._head, sort_keys=True).encode()).hexdigest()[:24]
        self.path = folder / f"{attack}-{digest}.jsonl"
        # Tried now, not after hours of work.
        try:
            try_writing(folder)
        except OSError as error:
            raise InputError(
                f"the attack's state cannot be written to {folder} ({error.strerror}); give a folder that can"
            ) from None

    def read(self) -> list[Any]:
        """The lines after the first; none if there is no file.

        Raises:
            InputError: the file is not what was written.
        """
        try:
            head, *lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
            if head != self._head:
                raise ValueError("another head")
        except FileNotFoundError:
            return []
        except ValueError:
            raise self.damaged() from None
        return lines

    def write(self, lines: list[Any]) -> None:
        """Replace what is there, all or nothing."""
        text = "".join(json.dumps(line) + "\n" for line in (self._head, *lines))
        write_whole(self.path, text, shared=True, private=True)

    def damaged(self) -> InputError:
        """The error that says that the file is not what was written."""
        return InputError(f"{self.path} is not the whole state of an attack; remove it to attack this prompt anew")
