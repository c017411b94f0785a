"""Who answers: a model loaded here, or one behind a server. Both are asked the same way, and their thoughts cut off."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bdpo_pl.data.chat_template import chat_encoder, opens_thought
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointError, EndpointOptions
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.evaluation.verdict_log import Answer
from bdpo_pl.forward.generation import encode_prompts, generate

_OPENED = re.compile(r"^\s*<think(?:ing)?>")
_CLOSED = re.compile(r"</think(?:ing)?>")
_LAST_TOKENS = 8


@dataclass
class GenerationOptions:
    """How responses are generated: greedily, so that the same command gives the same ones.

    Args:
        max_new_tokens: tokens in a response at most. A refusal shows early; a judge of harm wants 256 or more.
        max_thought_tokens: further tokens for models that think before they answer. Thoughts are cut off before an
            answer is judged, and an answer whose thought does not end within the limit is counted as such.
        batch_size: prompts answered at a time; lower it if memory runs out.
        use_template: put each prompt into the model's chat template, if it has one.
        chat_template_kwargs: variables of the chat template, as in `{enable_thinking: false}`.
        too_long: what becomes of prompts that do not fit into a model: `stop` before anything is asked, or `leave_out`
            for all models, which is counted.

    Raises:
        InputError: a number out of range.
    """

    max_new_tokens: int = 64
    max_thought_tokens: int = 0
    batch_size: int = 32
    use_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    too_long: Literal["stop", "leave_out"] = "stop"

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("max_thought_tokens", 0)):
            if getattr(self, name) < least:
                raise InputError(f"generation.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def room(self) -> int:
        """Tokens that a model may generate, thoughts included."""
        return self.max_new_tokens + self.max_thought_tokens


@dataclass(frozen=True)
class Question:
    """A prompt as a model gets it.

    Attributes:
        asked: token ids, or the messages that a server is sent: what the answer depends on.
        length: by which questions are put together, longest first.
        prefill: what the answer begins with, which the model did not say itself.
    """

    asked: Any
    length: int
    prefill: str = ""


class Answerer(ABC):
    """A model that answers prompts, each in a conversation of its own.

    Attributes:
        facts: what identifies the model.
        batch: prompts that it is given at a time.
    """

    facts: Mapping[str, str]
    batch: int

    @abstractmethod
    def questions(self, prompts: Sequence[EvaluationPrompt]) -> list[Question]:
        """What the model is asked, in order."""

    @abstractmethod
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order.

        Raises:
            PartlyAnsweredError: it failed, with the answers that came before.
            InputError: it failed.
        """

    def respond(self, prompts: Sequence[str]) -> list[str]:
        """The answers to `prompts`, without thoughts."""
        asked = [EvaluationPrompt(prompt, prompt) for prompt in prompts]
        return [answer.text for answer in self.answer(self.questions(asked))] if asked else []


class PartlyAnsweredError(InputError):
    """A failure after some answers.

    Attributes:
        answers: None where there is none.
    """

    def __init__(self, message: str, answers: Sequence[Answer | None]) -> None:
        super().__init__(message)
        self.answers = list(answers)


class LocalAnswerer(Answerer):
    """A model in this process.

    Args:
        facts: what identifies it.
        tokenizer: the model's.
        load: gives model and tokenizer; called when the first answer is generated.
        options: of the generation.
    """

    def __init__(
        self,
        facts: Mapping[str, str],
        tokenizer: Any,
        load: Callable[[], tuple[Any, Any]],
        options: GenerationOptions,
    ) -> None:
        self.facts, self._tokenizer, self._load, self._options = facts, tokenizer, load, options
        self.batch = options.batch_size

    def questions(self, prompts: Sequence[EvaluationPrompt]) -> list[Question]:
        """Token ids of each prompt, in the chat template if there is one, and of what its answer begins with."""
        if self._tokenizer.chat_template:
            chat_encoder(self._tokenizer, self._options.chat_template_kwargs)
        texts = [prompt.text for prompt in prompts]
        ids = encode_prompts(self._tokenizer, texts, use_template=self._options.use_template)
        begun = [
            [*row, *(chat_encoder(self._tokenizer).texts([prompt.prefill], add_special_tokens=False)[0])]
            if prompt.prefill
            else list(row)
            for row, prompt in zip(ids, prompts, strict=True)
        ]
        return [Question(row, len(row), prompt.prefill) for row, prompt in zip(begun, prompts, strict=True)]

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Greedy answers.

        Raises:
            InputError: memory runs out, or a question does not fit.
        """
        model, tokenizer = self._load()
        ids = [question.asked for question in questions]
        try:
            responses = generate(model, tokenizer, ids, max_new_tokens=self._options.room, batch_size=len(ids))
        except RuntimeError as error:
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            raise InputError(
                f"generating {len(ids)} responses at a time ran out of memory; lower generation.batch_size"
            ) from error
        return [
            split_thought(
                f"{question.prefill} {response.text}".strip() if question.prefill else response.text,
                response.num_tokens,
                response.finished,
                opened=self._opens(question.asked),
            )
            for response, question in zip(responses, questions, strict=True)
        ]

    def _opens(self, ids: list[int]) -> bool:
        return opens_thought(self._tokenizer.decode(ids[-_LAST_TOKENS:]))


class ServedAnswerer(Answerer):
    """A model behind an OpenAI-compatible server.

    Args:
        options: which, and how to speak to it.
        generation: of the generation; the server puts prompts into its own chat template.
    """

    def __init__(self, options: EndpointOptions, generation: GenerationOptions) -> None:
        self._endpoint = Endpoint(options)
        self.facts = {"model": f"{options.model} at {self._endpoint.url}", "temperature": str(options.temperature)}
        # Some for every worker, so that few wait for the slowest, and little is lost if the server goes away.
        self.batch = 4 * options.parallel

    def questions(self, prompts: Sequence[EvaluationPrompt]) -> list[Question]:
        """Each prompt as the one turn of a conversation.

        Raises:
            InputError: an answer is to begin with given words, which servers do not all take.
        """
        if any(prompt.prefill for prompt in prompts):
            raise InputError(
                f"{self.facts['model']}: attacks.prefill begins answers, which servers do not all take; leave it out, "
                "or name a folder"
            )
        return [Question([{"role": "user", "content": prompt.text}], len(prompt.text)) for prompt in prompts]

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """What the server answers, several at a time.

        Raises:
            PartlyAnsweredError: one could not be had, after retries.
        """
        try:
            replies: Sequence[str | None] = self._endpoint.reply([question.asked for question in questions])
        except EndpointError as error:
            raise PartlyAnsweredError(str(error), [_served(reply) for reply in error.replies]) from error
        return [answer for reply in replies if (answer := _served(reply)) is not None]


def _served(reply: str | None) -> Answer | None:
    # A server tells neither lengths nor which answers were cut.
    return None if reply is None else split_thought(reply.strip(), 0, True, opened=False)


def split_thought(text: str, num_tokens: int, finished: bool, *, opened: bool) -> Answer:
    """The answer in a model's text, its thought kept apart.

    Args:
        text: all that the model generated.
        num_tokens: of it.
        finished: it ended by itself.
        opened: the prompt ends within a thought, so that the text begins with one.
    """
    closings = list(_CLOSED.finditer(text))
    begins = opened or _OPENED.match(text) is not None
    if closings and (begins or not _OPENED.search(text)):
        last = closings[-1]
        thought = _OPENED.sub("", text[: last.start()]).strip()
        return Answer(text[last.end() :].strip(), num_tokens, finished, thought)
    if begins:
        return Answer("", num_tokens, finished, _OPENED.sub("", text).strip(), unfinished_thought=True)
    return Answer(text, num_tokens, finished)
