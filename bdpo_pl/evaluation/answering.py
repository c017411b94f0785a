"""Answering and judging of suites, resumed from recorded answers and verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from bdpo_pl.errors import InputError, MachineError
from bdpo_pl.evaluation.answerers import Answerer, GenerationOptions, Question
from bdpo_pl.evaluation.chat.endpoint import EndpointError
from bdpo_pl.evaluation.judges.judge import Exchange, Judge, JudgingError, Verdict
from bdpo_pl.evaluation.oddities import oddities
from bdpo_pl.evaluation.suites.suite import Suite
from bdpo_pl.evaluation.verdict_log import Answer, Judged, RecordFile, key_of
from bdpo_pl.refusals import is_refusal, rules_sha256

_LABELLED = 64
"""Number of labelled answers that are judged at a time, and then recorded."""


class _JudgeError(InputError):
    """A failure of the judge."""


@dataclass
class Asker:
    """Judging of models' answers by one judge, with a record of its verdicts.

    Attributes:
        judge: judge that classifies the answers.
        records: file of known answers and verdicts, to which new ones are added.
        options: options of the generation.
        needs_texts: true if all answers must be available after the judging; those that were judged but not kept are
            generated again.
        on_progress: function called with the number of prompts finished since the last call.
        tokens: number of tokens generated until now, without those of answers that are being generated.
        seconds: time of the generation, without that of judging.
    """

    judge: Judge
    records: RecordFile
    options: GenerationOptions
    needs_texts: bool = False
    on_progress: Callable[[int], None] = lambda count: None
    tokens: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.judge_key = _key_of_judge(self.judge)
        self._phrases = rules_sha256()
        self._deferred: list[tuple[JudgingError, str]] = []
        self._has_judged = False

    def ask(self, suite: Suite, answerer: Answerer) -> list[Judged]:
        """Return a verdict on the answer to each prompt of `suite`, in order.

        Args:
            suite: the prompts.
            answerer: the model; it is loaded only if an answer has to be generated.

        Raises:
            InputError: the judge or the model fails. Verdicts before the failure are recorded. A judge that has no
                verdict on some prompts, but has on others, fails after the last prompt.
            MachineError: a process of the model fails. The same holds.
        """
        self._deferred.clear()
        questions, keys = self._keyed(suite, answerer)
        left = [i for i, key in enumerate(keys) if not self._is_done(key)]
        self._has_judged |= len(left) < len(keys)
        self.on_progress(len(keys) - len(left))
        unanswered = [i for i in left if self.records.answer(keys[i]) is None]
        answered = [i for i in left if self.records.answer(keys[i]) is not None]
        for start in range(0, len(answered), answerer.batch):
            self._judge(suite, keys, answered[start : start + answerer.batch])
        # Longest first, so that running out of memory shows at once. The sort is stable, so the order is always the
        # same.
        unanswered.sort(key=lambda i: -questions[i].length)
        if unanswered:
            self._answer(suite, answerer, questions, keys, unanswered)
        found = [self._verdict(key) for key in keys]
        if self._deferred:
            failure, place = self._deferred[0]
            raise self._judge_error(failure, f" {found.count(None)} of {suite.name} have no verdict, first {place}.")
        return [judged for judged in found if judged is not None]

    def answers(self, suite: Suite, answerer: Answerer) -> list[Answer | None]:
        """Return the available answers to `suite`: all with `needs_texts`, else those of this run or kept on disk."""
        return [self.records.answer(key) for key in self._keyed(suite, answerer)[1]]

    def _keyed(self, suite: Suite, answerer: Answerer) -> tuple[list[Question], list[str]]:
        """Return the questions that the model gets, and the keys of its answers.

        A key is a digest of the exact question, token by token: with another tokenizer or chat template it is another
        question.
        """
        questions = answerer.questions(suite.prompts)
        settings: dict[str, object] = {**answerer.facts, "kind": suite.kind}
        settings |= {
            "max_new_tokens": self.options.max_new_tokens,
            "max_thought_tokens": self.options.max_thought_tokens,
        }
        keys = [
            key_of({**settings, "asked": question.asked, "prompt": prompt.text, "behaviour": prompt.behaviour})
            for question, prompt in zip(questions, suite.prompts, strict=True)
        ]
        return questions, keys

    def _is_done(self, key: str) -> bool:
        judged = self._verdict(key) is not None
        return judged and (not self.needs_texts or self.records.answer(key) is not None)

    def _verdict(self, key: str) -> Judged | None:
        """Return the verdict on record; None if there is none, or if other phrases than today's contributed to it."""
        judged = self.records.verdict(key, self.judge_key)
        return judged if judged is not None and judged.phrases in ("", self._phrases) else None

    def _answer(
        self, suite: Suite, answerer: Answerer, questions: list[Question], keys: list[str], positions: Sequence[int]
    ) -> None:
        """Have the questions at `positions` answered, and judge the answers whenever there is a batch of them."""
        answerer.prepare()
        ready: list[int] = []
        began = time.perf_counter()

        def judge() -> None:
            nonlocal began
            self.seconds += time.perf_counter() - began
            some = list(ready)
            ready.clear()
            if some:
                self._judge(suite, keys, some)
            began = time.perf_counter()

        def take(number: int, answer: Answer) -> None:
            self.records.add_answer(keys[positions[number]], answer)
            ready.append(positions[number])
            self.tokens += answer.num_tokens
            if len(ready) == answerer.batch:
                judge()

        try:
            answerer.answer([questions[i] for i in positions], take)
        except _JudgeError:
            raise
        except (InputError, MachineError) as error:
            judge()
            raised = MachineError if isinstance(error, MachineError) else InputError
            raise raised(f"{error}. {_kept(self.records)}") from error
        judge()

    def _judge(self, suite: Suite, keys: list[str], positions: Sequence[int]) -> None:
        answers = [self.records.answer(keys[i]) for i in positions]
        exchanges = [
            Exchange(suite.prompts[i].behaviour, answer.text)
            for i, answer in zip(positions, answers, strict=True)
            if answer is not None
        ]
        verdicts, failure = _verdicts(self.judge, exchanges)
        for i, verdict, answer in zip(positions, verdicts, answers, strict=True):
            if verdict is not None:
                assert answer is not None
                self.records.add_verdict(keys[i], self.judge_key, self._judged(verdict, suite, i, answer))
                self._has_judged = True
        if failure is not None:
            if not self._has_judged or not _is_of_some(failure):
                raise self._judge_error(failure) from failure
            place = next(suite.prompts[i].place for i, known in zip(positions, verdicts, strict=True) if known is None)
            self._deferred.append((failure, place))
        self.on_progress(sum(verdict is not None for verdict in verdicts))

    def _judged(self, verdict: Verdict, suite: Suite, position: int, answer: Answer) -> Judged:
        """Add to `verdict` what is known of the answer, and whether it refuses a benign request if the judge is silent.

        The phrases decide that then.
        """
        phrases = ""
        if suite.kind == "benign" and verdict.refused is None:
            phrases, verdict = self._phrases, replace(verdict, refused=is_refusal(answer.text))
        prompt = suite.prompts[position].text
        odd = oddities(prompt, answer.text, answer.finished, answer.unfinished_thought)
        return Judged(verdict, answer.num_tokens, answer.finished, odd, phrases)

    def _judge_error(self, failure: InputError, what: str = "") -> _JudgeError:
        return _JudgeError(f"{failure}.{what} {_kept(self.records)}")


def _is_of_some(failure: InputError) -> TypeGuard[JudgingError]:
    """Return true if others can still be judged: the judge was reached, and had no verdict on some exchanges."""
    return isinstance(failure, JudgingError) and not isinstance(failure.__cause__, EndpointError)


def judge_labelled(judge: Judge, exchanges: Sequence[Exchange], records: RecordFile) -> list[Verdict | None]:
    """Return the verdict of `judge` on each exchange of a labelled file, on record or new; None where it has none.

    Raises:
        InputError: the judge cannot be reached, or has no verdict on any of the first exchanges. Verdicts before the
            failure are recorded.
    """
    judge_key = _key_of_judge(judge)
    keys = [key_of({"prompt": one.prompt, "labelled response": one.response}) for one in exchanges]
    known = [records.verdict(key, judge_key) is not None for key in keys]
    left = list({key: one for key, one, is_known in zip(keys, exchanges, known, strict=True) if not is_known}.items())
    has_judged = any(known)
    for start in range(0, len(left), _LABELLED):
        some = left[start : start + _LABELLED]
        verdicts, failure = _verdicts(judge, [one for _, one in some])
        for (key, _), verdict in zip(some, verdicts, strict=True):
            if verdict is not None:
                records.add_verdict(key, judge_key, Judged(verdict, num_tokens=0, finished=True))
                has_judged = True
        if failure is not None and not (has_judged and _is_of_some(failure)):
            raise InputError(f"{failure}. {_kept(records)}") from failure
    found = [records.verdict(key, judge_key) for key in keys]
    return [None if judged is None else judged.verdict for judged in found]


def _key_of_judge(judge: Judge) -> str:
    return key_of({"judge": judge.name, **judge.facts()})


def _verdicts(judge: Judge, exchanges: Sequence[Exchange]) -> tuple[Sequence[Verdict | None], InputError | None]:
    """Return the judge's verdicts, None for an exchange without one, and its failure, if it failed."""
    try:
        return judge.judge(exchanges), None
    except InputError as error:
        return error.verdicts if isinstance(error, JudgingError) else [None] * len(exchanges), error


def _kept(records: RecordFile) -> str:
    return f"The verdicts so far are in {records.path}: the same command continues from there"
