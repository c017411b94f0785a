"""Prompt refinement like PAIR (Chao et al., arXiv:2310.08419): a model rewrites a request until it succeeds.

An attacking model gets the request, proposes a prompt, and sees the answer and a judge's verdict. Several such streams
run side by side, for a few steps. The attack needs only the answers of the attacked model.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bdpo_pl.errors import require_at_least
from bdpo_pl.evaluation.answerers import after_thought
from bdpo_pl.evaluation.attacks.attack import (
    Attack,
    AttackResult,
    Attempted,
    Progress,
    StateFile,
    attacked,
    steps_of,
    succeeded,
)
from bdpo_pl.evaluation.attacks.attack import Target as AttackedModel
from bdpo_pl.evaluation.attacks.budget import Budget, success_curve
from bdpo_pl.evaluation.attacks.pair_prompts import Proposal, feedback, once_more, opening, parse_proposal, words
from bdpo_pl.evaluation.chat.chat_model import ChatModel, Message, model_facts
from bdpo_pl.evaluation.chat.completions import OptionNames
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointOptions
from bdpo_pl.evaluation.judges.judge import Exchange, Judge, Verdict
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt

NAME = "pair"

ATTACKER_NAMES = OptionNames("attacks.attacker")
"""Names of the options of requests to the attacking model, for messages."""

Target = Callable[[Sequence[str]], list[str]]
"""The attacked model: a function from prompts to its responses, in order."""


@dataclass
class RefinementOptions:
    """Number of attempts. A prompt costs at most streams × steps queries of the target; the paper uses 30 × 3.

    Args:
        streams: number of parallel conversations with the attacker, each with its own approach.
        steps: maximum number of prompts that each stream tries.
        history: number of the stream's latest attempts that the attacker sees.
        retries: number of further queries if the attacker's answer does not have the required form.

    Raises:
        InputError: a value is out of range.
    """

    streams: int = 3
    steps: int = 5
    history: int = 3
    retries: int = 2

    def __post_init__(self) -> None:
        require_at_least("refinement", self, streams=1, steps=1, history=1, retries=0)


@dataclass(frozen=True)
class Attempt:
    """A prompt that was tried on the target."""

    stream: int
    proposal: Proposal
    response: str
    verdict: Verdict

    @property
    def passed(self) -> bool:
        """True if the attempt succeeded."""
        return succeeded(self.verdict, self.response)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Attempt:
        """Restore an attempt from a line of a state file."""
        return cls(value["stream"], Proposal(**value["proposal"]), value["response"], Verdict(**value["verdict"]))


@dataclass(frozen=True)
class _Step:
    attempts: list[Attempt] = field(default_factory=list)
    unparsable: int = 0

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> _Step:
        return cls(list(map(Attempt.from_json, value["attempts"])), value["unparsable"])


@dataclass(frozen=True)
class Refinement:
    """An attack by refinement.

    Args:
        attacker: model that proposes prompts. It should not refuse to; sampling makes its streams differ more.
        target: the attacked model.
        judge: judge of whether an attempt succeeded.
        options: number of attempts.
        target_key: identifier of the target (weights, generation options); state saved for another key is not used.
        fits: function that returns whether a prompt fits into the target's window; a prompt that does not is rejected
            like an answer that cannot be parsed.
        over: function that returns whether the attack must end now.
    """

    attacker: ChatModel
    target: Target
    judge: Judge
    options: RefinementOptions
    target_key: str
    fits: Callable[[str], bool] = lambda prompt: True
    over: Callable[[], bool] = lambda: False

    def attack(
        self, prompts: Sequence[EvaluationPrompt], *, folder: Path | None = None, on_progress: Progress | None = None
    ) -> list[EvaluationPrompt]:
        """Return `prompts`, each as in its most successful attempt; `results` returns more details."""
        return [result.prompt for result in self.results(prompts, folder=folder, on_progress=on_progress)]

    def results(
        self, prompts: Sequence[EvaluationPrompt], *, folder: Path | None = None, on_progress: Progress | None = None
    ) -> Iterator[AttackResult]:
        """Attack one prompt after the other, each until an attempt succeeds.

        Args:
            prompts: prompts to attack; the attacker gets their `behaviour` as its goal.
            folder: folder for the attempts on each prompt, saved under a warning because they contain the target's
                answers. An interrupted attack resumes from it. None: no attempts are saved.
            on_progress: function called after each prompt.

        Yields:
            The result of each prompt, in order, until the attack must end: `details` has `succeeded`, `response` and
            `verdict` of the best attempt (None if there was none), `queries` of the target, `first_success`, the number
            of queries until the first success (None if there was none), and `unparsable`, the number of the attacker's
            answers that could not be parsed or whose prompt did not fit.

        Raises:
            InputError: attacker, target or judge fails, or a state file is damaged; finished steps are kept.
        """
        for done, prompt in enumerate(prompts, start=1):
            if self.over():
                return
            file = None if folder is None else StateFile(folder, NAME, self._facts(prompt.behaviour))
            yield self._run(prompt, file)
            if on_progress is not None:
                on_progress(done, len(prompts))

    def _run(self, prompt: EvaluationPrompt, file: StateFile | None) -> AttackResult:
        steps = _read(file)
        while len(steps) < self.options.steps and not _succeeded(steps) and not self.over():
            steps.append(self._step(prompt.behaviour, steps))
            if file is not None:
                file.write([asdict(step) for step in steps])
        best, details = outcome([attempt for step in steps for attempt in step.attempts])
        unparsable = sum(step.unparsable for step in steps)
        if best is None:
            warnings.warn(
                f"{prompt.place or repr(prompt.behaviour[:60])}: no answer of the attacker {self.attacker.name} in "
                f"{unparsable} could be read, so the request stays as it is; choose another attacker",
                stacklevel=3,
            )
        details["unparsable"] = unparsable
        text = prompt.behaviour if best is None else best.proposal.prompt
        # The attacker starts from the bare request, so an earlier framing of the prompt is dropped.
        return AttackResult(attacked(prompt, text, NAME, alone=True), len(steps), details)

    def _step(self, goal: str, steps: Sequence[_Step]) -> _Step:
        """Make one attempt in every stream."""
        conversations = [self._conversation(goal, stream, steps) for stream in range(self.options.streams)]
        proposals, unparsable = propose(self.attacker, conversations, self.options.retries, self.fits)
        if not proposals:
            return _Step([], unparsable)
        responses = self.target([proposal.prompt for proposal in proposals.values()])
        verdicts = self.judge.judge([Exchange(goal, response) for response in responses])
        tried = zip(proposals.items(), responses, verdicts, strict=True)
        return _Step([Attempt(*proposal, response, verdict) for proposal, response, verdict in tried], unparsable)

    def _conversation(self, goal: str, stream: int, steps: Sequence[_Step]) -> list[Message]:
        turns = opening(goal, stream)
        past = [attempt for step in steps for attempt in step.attempts if attempt.stream == stream]
        for attempt in past[-self.options.history :]:
            turns += [attempt.proposal.to_turn(), feedback(attempt.response, attempt.verdict)]
        return turns

    def _facts(self, goal: str) -> dict[str, Any]:
        return {
            "request": goal,
            "target": self.target_key,
            "attacker": model_facts(self.attacker),
            "words": hashlib.sha256("\n".join(words()).encode()).hexdigest()[:16],
            "judge": {"name": self.judge.name, **self.judge.facts()},
            "options": asdict(self.options),
        }


def propose(
    attacker: ChatModel, conversations: list[list[Message]], retries: int, fits: Callable[[str], bool]
) -> tuple[dict[int, Proposal], int]:
    """Return the proposals that could be parsed, by conversation, and the number of answers that could not.

    Args:
        attacker: model that proposes prompts.
        conversations: a conversation for each proposal.
        retries: number of further queries if an answer does not have the required form.
        fits: function that returns whether a prompt fits into the target's window.
    """
    proposals: dict[int, Proposal] = {}
    asked = dict(enumerate(conversations))
    unparsable = 0
    for _ in range(retries + 1):
        replies = map(after_thought, attacker.reply(list(asked.values())))
        again = {}
        for i, reply in zip(asked, replies, strict=True):
            proposal = parse_proposal(reply)
            if proposal is None or not fits(proposal.prompt):
                unparsable += 1
                again[i] = [*conversations[i], *once_more(reply)]
            else:
                proposals[i] = proposal
        asked = again
        if not asked:
            break
    return dict(sorted(proposals.items())), unparsable


class PairAttack(Attack):
    """Refinement by an attacker behind an endpoint.

    Args:
        attacker: endpoint of the attacking model.
        options: number of attempts.
    """

    name = NAME

    def __init__(self, attacker: EndpointOptions, options: RefinementOptions | None = None) -> None:
        self._attacker = Endpoint(attacker, names=ATTACKER_NAMES)
        self._options = options or RefinementOptions()

    def check(self, budget: Budget) -> None:
        """Raise `InputError` if `budget` does not suffice for one attempt of every stream."""
        self._steps(budget)

    def _steps(self, budget: Budget) -> int:
        return budget.steps(self._options.steps, self._options.streams, NAME)

    def run(self, prompts: Sequence[EvaluationPrompt], target: AttackedModel, step: Callable[[], None]) -> Attempted:
        """Refine each prompt until the judge decides that the target did not refuse, or that it complied."""
        limit = self._steps(target.budget)
        options = replace(self._options, steps=limit)
        refinement = Refinement(
            self._attacker, target.respond, target.judge, options, target.key, target.fits, target.budget.over
        )
        found = list(refinement.results(prompts, folder=target.folder, on_progress=lambda done, total: step()))
        queries = sum(int(result.details["queries"]) for result in found)
        unread = sum(int(result.details["unparsable"]) for result in found)
        cost = f"{steps_of(found)}; {queries} queries; {unread} answers of {self._attacker.name} could not be read"
        return attempted(found, cost, limit * options.streams)


def outcome(attempts: Sequence[Attempt]) -> tuple[Attempt | None, dict[str, Any]]:
    """Return the best of the attempts on a prompt, if there is one, and the details of all of them for its result."""
    best = max(attempts, key=rank, default=None)
    return best, {
        "succeeded": best is not None and best.passed,
        "response": None if best is None else best.response,
        "verdict": None if best is None else asdict(best.verdict),
        "queries": len(attempts),
        "first_success": next((k for k, attempt in enumerate(attempts, start=1) if attempt.passed), None),
    }


def attempted(found: Sequence[AttackResult], cost: str, most: int) -> Attempted:
    """Return the results of an attack by refinement, with its success by number of queries.

    Args:
        found: results whose details have `first_success`.
        cost: cost of the attack, in a few words.
        most: maximum number of queries for a prompt.
    """
    curve = success_curve([result.details["first_success"] for result in found], most) if found else None
    return Attempted([result.prompt for result in found], cost, curve)


def chat_target(model: ChatModel) -> Target:
    """Return `model` as a target that gets each prompt in a conversation of its own."""
    return lambda prompts: model.reply([[{"role": "user", "content": prompt}] for prompt in prompts])


def rank(attempt: Attempt) -> tuple[bool, float, bool]:
    """Return the rank of an attempt, for comparisons: success first, then score, then no refusal."""
    verdict = attempt.verdict
    return attempt.passed, verdict.score or 0.0, verdict.refused is False


def _succeeded(steps: Sequence[_Step]) -> bool:
    return any(attempt.passed for step in steps for attempt in step.attempts)


def _read(file: StateFile | None) -> list[_Step]:
    if file is None:
        return []
    try:
        return [_Step.from_json(line) for line in file.read()]
    except (KeyError, TypeError):
        raise file.damaged() from None
