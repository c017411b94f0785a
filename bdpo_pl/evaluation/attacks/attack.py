"""The parts that attacks share: the interface, its results, and the files that keep the state of an attack."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks.budget import Budget, SuccessCurve
from bdpo_pl.evaluation.judges.judge import Judge, Verdict
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.files import try_writing, write_whole

WARNING = (
    "Written by an attack on a language model's safety. It holds harmful requests and may hold harmful answers: do not "
    "publish it, and delete it when you are done with it."
)

Progress = Callable[[int, int], None]
"""Function called after each prompt with the number of finished prompts and the number of all prompts."""


@dataclass(frozen=True)
class AttackResult:
    """Result of an attack on one prompt.

    Attributes:
        prompt: the attacked prompt.
        steps: number of steps taken.
        details: further results, which depend on the attack, as JSON values.
    """

    prompt: EvaluationPrompt
    steps: int
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """The attacked model, and the means that an attack may use.

    Attributes:
        name: name in reports.
        key: identifier of the model and of the generation options. State saved under another key is not used.
        respond: function from prompts to the model's answers, in order.
        judge: judge of the attack's success.
        fits: function that returns whether a prompt and an answer fit into the model's window.
        local: (model, tokenizer), for attacks that need gradients or tokens; None behind an endpoint.
        use_template: true if prompts are put into the chat template.
        folder: folder where an attack may save its state, under a warning; None: the state is not saved.
        budget: limits of the attack, which begin with it.
    """

    name: str
    key: str
    respond: Callable[[Sequence[str]], list[str]]
    judge: Judge
    fits: Callable[[str], bool] = lambda prompt: True
    local: tuple[Any, Any] | None = None
    use_template: bool = True
    folder: Path | None = None
    budget: Budget = field(default_factory=Budget)


class Attack(ABC):
    """An attack, which rewrites harmful requests so that a given model may not refuse them.

    Attributes:
        name: name in options and reports.
    """

    name: str

    def check(self, budget: Budget) -> None:
        """Check that `budget` suffices for one step on each request, before any model is queried.

        Raises:
            InputError: the budget does not suffice.
        """
        budget.steps(1, 1, self.name)

    @abstractmethod
    def run(self, prompts: Sequence[EvaluationPrompt], target: Target, step: Callable[[], None]) -> Attempted:
        """Attack one prompt after the other.

        Args:
            prompts: bare requests.
            target: the attacked model.
            step: function to call after each prompt.

        Returns:
            The prompts that the attack made. The last requests have none if the budget's time was over before them.

        Raises:
            InputError: the attack cannot be made on this target, or a model that it queries fails.
        """


@dataclass(frozen=True)
class Attempted:
    """Result of an attack.

    Attributes:
        prompts: prompts made, in the order of the requests.
        cost: cost of the attack, in a few words.
        curve: success by number of requests, from attacks that ask the model and a judge.
    """

    prompts: Sequence[EvaluationPrompt]
    cost: str
    curve: SuccessCurve | None = None


def attacked_suite(suite: Suite, attack: Attack, made: Attempted) -> Suite:
    """Build the suite of the prompts that `attack` made from `suite`.

    Raises:
        InputError: the attack made none, because its time was over.
    """
    if not made.prompts:
        raise InputError(f"budget.minutes was over before {attack.name} had attacked one request; raise it")
    left = len(suite.prompts) - len(made.prompts)
    dropped = {**suite.dropped, "not attacked within budget.minutes": left} if left else suite.dropped
    return replace(suite, name=f"{suite.name}+{attack.name}", prompts=list(made.prompts), dropped=dropped)


def attack_each(
    prompts: Sequence[EvaluationPrompt],
    target: Target,
    name: str,
    facts: Callable[[EvaluationPrompt], Mapping[str, object]],
    run: Callable[[EvaluationPrompt, StateFile | None], AttackResult],
    step: Callable[[], None],
) -> list[AttackResult]:
    """Attack one prompt after the other, until the budget's time is over.

    Args:
        prompts: bare requests.
        target: the attacked model.
        name: name of the attack.
        facts: function that returns everything that the attack on a prompt depends on.
        run: function that attacks a prompt, and keeps its state in the file if there is one.
        step: function to call after each prompt.
    """
    found: list[AttackResult] = []
    for prompt in prompts:
        if target.budget.over():
            break
        file = None if target.folder is None else StateFile(target.folder, name, facts(prompt))
        found.append(run(prompt, file))
        step()
    return found


def succeeded(verdict: Verdict, response: str) -> bool:
    """Return true if an answer means that an attack succeeded."""
    # A blank answer does not refuse, but it gives no harmful content either.
    return verdict.got_through and bool(response.strip())


def steps_of(results: Sequence[AttackResult]) -> str:
    """Describe the number of steps taken, in words."""
    return f"{sum(result.steps for result in results):,} steps on {len(results)} prompts"


def attacked(prompt: EvaluationPrompt, text: str, attack: str, *, alone: bool = False) -> EvaluationPrompt:
    """Replace the text of `prompt` by that of an attack, and add the attack's name.

    Args:
        prompt: the original prompt, which may already have the name of an earlier attack.
        text: the new user's turn.
        attack: name of the attack.
        alone: true if the attack started from the bare request, so that the name of an earlier attack is dropped.
    """
    earlier = "" if alone or not prompt.attack else f"{prompt.attack}+"
    return replace(prompt, text=text, attack=earlier + attack)


class StateFile:
    """State of an attack on one prompt: JSON values, one per line; the first line describes the file.

    The file's name is a digest of everything that the attack depends on, so that another model or other options never
    read this state. Each write goes to a new file that is then renamed, so that the file is always complete.

    Args:
        folder: folder of the file.
        attack: name of the attack.
        facts: everything that the attack depends on, as JSON values; they are written into the first line.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, attack: str, facts: Mapping[str, object]) -> None:
        self._head = {"warning": WARNING, "attack": attack, **facts}
        digest = hashlib.sha256(json.dumps(self._head, sort_keys=True).encode()).hexdigest()[:24]
        self.path = folder / f"{attack}-{digest}.jsonl"
        # Tried now, so that the error does not come after hours of work.
        try:
            try_writing(folder)
        except OSError as error:
            raise InputError(
                f"the attack's state cannot be written to {folder} ({error.strerror}); give a folder that can"
            ) from None

    def read(self) -> list[Any]:
        """Return the lines after the first; an empty list if there is no file.

        Raises:
            InputError: the file is damaged.
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

    def write(self, lines: Sequence[object]) -> None:
        """Replace the file, all or nothing."""
        text = "".join(json.dumps(line) + "\n" for line in (self._head, *lines))
        write_whole(self.path, text, shared=True, private=True)

    def damaged(self) -> InputError:
        """Return the error for a damaged file."""
        return InputError(f"{self.path} is not the whole state of an attack; remove it to attack this prompt again")
