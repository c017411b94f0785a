"""Has a model answer a suite and a judge tell what the answers are, going on from what is on record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges.judge import Exchange, Judge, Verdict
from bdpo_pl.evaluation.oddities import oddities
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import Judged, RecordFile, key_of
from bdpo_pl.forward.generation import Response, encode_prompts, generate
from bdpo_pl.refusals import is_refusal


@dataclass
class GenerationOptions:
    """How responses are generated: greedily, so that the same command gives the same ones.

    Args:
        max_new_tokens: tokens in a response at most. A refusal shows early; a judge of harm wants 256 or more.
        batch_size: prompts answered at a time; lower it if memory runs out.
        use_template: put each prompt into the model's chat template, if it has one.

    Raises:
        InputError: a number below 1.
    """

    max_new_tokens: int = 64
    batch_size: int = 32
    use_template: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"generation.{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Asker:
    """Asks one judge about the answers of models, and writes down what it says.

    Attributes:
        judge: tells what answers are.
        records: what is known already, and where the rest goes.
        options: of the generation.
        needs_texts: answers must be at hand after the judging, so those that are judged but not kept are given anew.
        on_progress: told the number of prompts done since the last time.
    """

    judge: Judge
    records: RecordFile
    options: GenerationOptions
    needs_texts: bool = False
    on_progress: Callable[[int], None] = lambda count: None

    def __post_init__(self) -> None:
        self.judge_key = key_of({"judge": self.judge.name, **self.judge.facts()})

    def ask(self, suite: Suite, model: Mapping[str, str], load: Callable[[], tuple[Any, Any]]) -> list[Judged]:
        """A verdict on the answer to each prompt of `suite`, in order.

        Args:
            suite: the prompts.
            model: what identifies the model: weights, dtype.
            load: gives model and tokenizer; called only if something is left to generate.

        Raises:
            InputError: the judge or the model fails; what has been judged until then is on record.
        """
        keys = [self._key(suite, prompt, model) for prompt in suite.prompts]
        left = [i for i, key in enumerate(keys) if not self._is_done(key)]
        self.on_progress(len(keys) - len(left))
        unanswered = [i for i in left if self.records.answer(keys[i]) is None]
        answered = [i for i in left if self.records.answer(keys[i]) is not None]
        size = self.options.batch_size
        for start in range(0, len(answered), size):
            self._judge(suite, keys, answered[start : start + size])
        if unanswered:
            loaded, tokenizer = load()
            texts = [suite.prompts[i].text for i in unanswered]
            ids = encode_prompts(tokenizer, texts, use_template=self.options.use_template)
            # Longest first: what runs out of memory does so at once. The sort is stable: the same batches each time.
            order = sorted(range(len(ids)), key=lambda k: -len(ids[k]))
            for start in range(0, len(order), size):
                some = order[start : start + size]
                responses = self._generate(loaded, tokenizer, [ids[k] for k in some])
                for k, response in zip(some, responses, strict=True):
                    self.records.add_answer(keys[unanswered[k]], response)
                self._judge(suite, keys, [unanswered[k] for k in some])
        found = [self.records.verdict(key, self.judge_key) for key in keys]
        return [judged for judged in found if judged is not None]

    def response(self, suite: Suite, model: Mapping[str, str], position: int) -> Response:
        """The answer to the prompt at `position`; only where `needs_texts` or in the run that generated it."""
        response = self.records.answer(self._key(suite, suite.prompts[position], model))
        if response is None:
            raise KeyError(f"no answer at hand to prompt {position} of {suite.name}")
        return response

    def _key(self, suite: Suite, prompt: EvaluationPrompt, model: Mapping[str, str]) -> str:
        settings = {"max_new_tokens": self.options.max_new_tokens, "use_template": self.options.use_template}
        return key_of({**model, **settings, "prompt": prompt.text, "behaviour": prompt.behaviour, "kind": suite.kind})

    def _is_done(self, key: str) -> bool:
        judged = self.records.verdict(key, self.judge_key) is not None
        return judged and (not self.needs_texts or self.records.answer(key) is not None)

    def _generate(self, model: Any, tokenizer: Any, ids: list[list[int]]) -> list[Response]:
        try:
            return generate(
                model, tokenizer, ids, max_new_tokens=self.options.max_new_tokens, batch_size=len(ids)
            )  # fmt: skip
        except RuntimeError as error:
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            raise InputError(
                f"generating {len(ids)} responses at a time ran out of memory; lower generation.batch_size. What was "
                f"judged until now is in {self.records.path}: the same command goes on from there"
            ) from error

    def _judge(self, suite: Suite, keys: list[str], positions: list[int]) -> None:
        responses = [self.records.answer(keys[i]) for i in positions]
        exchanges = [
            Exchange(suite.prompts[i].behaviour, response.text)
            for i, response in zip(positions, responses, strict=True)
            if response is not None
        ]
        try:
            verdicts = self.judge.judge(exchanges)
        except InputError as error:
            kept = f"The verdicts until now are in {self.records.path}: the same command goes on from there"
            raise InputError(f"{error}. {kept}") from error
        for i, verdict, response in zip(positions, verdicts, responses, strict=True):
            assert response is not None
            odd = oddities(suite.prompts[i].text, response.text, response.finished)
            judged = Judged(_with_refusal(verdict, suite, response), response.num_tokens, response.finished, odd)
            self.records.add_verdict(keys[i], self.judge_key, judged)
        self.on_progress(len(positions))


def _with_refusal(verdict: Verdict, suite: Suite, response: Response) -> Verdict:
    """For a benign request, a verdict that tells whether it was refused: by phrases, where the judge does not."""
    if suite.kind == "harmful" or verdict.refused is not None:
        return verdict
    return replace(verdict, refused=is_refusal(response.text))
