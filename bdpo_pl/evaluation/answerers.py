"""Models that answer prompts, loaded here or behind a server. Thoughts are removed from their answers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from bdpo_pl.data.chat_template import ChatTemplate, Conversation, chat_encoder, opened_thought
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError, MachineError, is_out_of_memory, require_at_least
from bdpo_pl.evaluation.chat.completions import Completion, OptionNames
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointError, EndpointOptions
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.evaluation.verdict_log import Answer
from bdpo_pl.forward.generation import Response, encode_prompts, generate
from bdpo_pl.forward.response_text import begins_in_thought
from bdpo_pl.models.causal_lm import CausalLM

_OPENED = re.compile(r"^\s*<think(?:ing)?>")
_CLOSED = re.compile(r"</think(?:ing)?>")


@dataclass
class GenerationOptions:
    """Generation of responses. It is greedy, so that the same command gives the same responses.

    Args:
        max_new_tokens: maximum number of tokens in a response. A refusal shows early; a judge of harm needs 256 or
            more.
        max_thought_tokens: additional tokens for models that think before they answer. Thoughts are removed before an
            answer is judged. An answer whose thought does not end within the limit is counted as an unfinished thought.
        batch_size: number of prompts answered at a time; lower it if memory runs out.
        use_template: put each prompt into the model's chat template, if it has one.
        chat_template_kwargs: variables of the chat template, such as `{enable_thinking: false}`.
        too_long: treatment of prompts that do not fit into a model's window: `stop` before any model is queried, or
            `leave_out` the prompt for all models and count it.

    Raises:
        InputError: a number out of range.
    """

    max_new_tokens: int = 64
    max_thought_tokens: int = 0
    batch_size: int = 64
    use_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    too_long: Literal["stop", "leave_out"] = "stop"

    def __post_init__(self) -> None:
        require_at_least("generation", self, max_new_tokens=1, batch_size=1, max_thought_tokens=0)

    @property
    def room(self) -> int:
        """Maximum number of tokens that a model may generate, thoughts included."""
        return self.max_new_tokens + self.max_thought_tokens


@dataclass(frozen=True)
class Question:
    """A prompt in the form that a model gets.

    Attributes:
        asked: token ids, or the messages that are sent to a server; the answer depends on nothing else.
        length: length by which questions are grouped into batches, longest first.
        prefill: prescribed beginning of the answer, which the model did not generate.
        opened: true if the answer begins within a thought, which the prompt opens.
    """

    asked: Any
    length: int
    prefill: str = ""
    opened: bool = False


OnAnswer = Callable[[int, Answer], None]


def ignore_answer(number: int, answer: Answer) -> None:
    """Do nothing with an answer."""


class Answerer(ABC):
    """A model that answers prompts, each in a conversation of its own.

    Attributes:
        facts: facts that identify the model.
        batch: number of answers that are judged together.
        notes: notices on how the answers were generated, for reports.
    """

    facts: Mapping[str, str]
    batch: int
    notes: Collection[str] = ()

    @abstractmethod
    def questions(self, prompts: Sequence[EvaluationPrompt]) -> list[Question]:
        """Convert `prompts` to the form that the model gets, in order."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to load
        """Load what the first answer needs, if it is not loaded."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release what is held for answers; another answer would load it again."""

    @abstractmethod
    def answer(self, questions: Sequence[Question], on_answer: OnAnswer = ignore_answer) -> list[Answer]:
        """Answer `questions`, and return the answers in order.

        Args:
            questions: the questions; the longest should be the first, so that running out of memory shows at once.
            on_answer: function that is called with the number of a question and its answer, as soon as there is one.

        Raises:
            InputError: the model failed; `on_answer` was called with the answers until then.
        """

    def respond(self, prompts: Sequence[str]) -> list[str]:
        """Return the answers to `prompts`, without thoughts."""
        asked = [EvaluationPrompt(prompt, prompt) for prompt in prompts]
        return [answer.text for answer in self.answer(self.questions(asked))] if asked else []


class LocalAnswerer(Answerer):
    """A model in this process.

    Args:
        facts: facts that identify the model.
        tokenizer: the model's tokenizer.
        load: function that returns (model, tokenizer); it is called when the first answer is generated.
        options: options of the generation.
    """

    def __init__(
        self,
        facts: Mapping[str, str],
        tokenizer: TokenizerLike,
        load: Callable[[], tuple[CausalLM, TokenizerLike]],
        options: GenerationOptions,
    ) -> None:
        self.facts, self._tokenizer, self._load, self._options = facts, tokenizer, load, options
        self.batch = options.batch_size
        self.notes: list[str] = []

    def questions(self, prompts: Sequence[EvaluationPrompt]) -> list[Question]:
        """Tokenise each prompt, in the chat template if there is one, and the prescribed beginning of its answer."""
        if self._tokenizer.chat_template:
            chat_encoder(self._tokenizer, self._options.chat_template_kwargs)
        texts = [prompt.text for prompt in prompts]
        ids = encode_prompts(self._tokenizer, texts, use_template=self._options.use_template)
        return [self._question(list(row), prompt) for row, prompt in zip(ids, prompts, strict=True)]

    def _question(self, row: list[int], prompt: EvaluationPrompt) -> Question:
        if not prompt.prefill:
            return Question(row, len(row), opened=begins_in_thought(self._tokenizer, row))
        if self._options.use_template and self._tokenizer.chat_template:
            begun = self._begun(prompt)
            return Question(begun, len(begun), prompt.prefill)
        begun = [*row, *chat_encoder(self._tokenizer).texts([prompt.prefill], add_special_tokens=False)[0]]
        return Question(begun, len(begun), prompt.prefill, begins_in_thought(self._tokenizer, row))

    def _begun(self, prompt: EvaluationPrompt) -> list[int]:
        """Return the token ids of a prompt in the chat template, and of its prefill where the template puts answers."""
        encoder = chat_encoder(self._tokenizer)
        asked, spelled = encoder.protect(Conversation([{"role": "user", "content": prompt.text}]))
        opened = encoder.template.prompt(asked)
        prefill = encoder.control.protect(prompt.prefill, spelled)
        return encoder.control.encode([opened + _to_answer(encoder.template, opened) + prefill], [spelled])[0]

    def prepare(self) -> None:
        """Load the model."""
        self._load()

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer = ignore_answer) -> list[Answer]:
        """Generate answers greedily.

        Raises:
            InputError: memory runs out, or a question does not fit into the model's window.
        """
        model, tokenizer = self._load()
        answers: dict[int, Answer] = {}

        def take(number: int, response: Response) -> None:
            prefill = questions[number].prefill
            answers[number] = split_thought(
                f"{prefill} {response.text}".strip() if prefill else response.text,
                response.num_tokens,
                response.finished,
                opened=questions[number].opened,
            )
            on_answer(number, answers[number])

        try:
            generate(
                model,
                tokenizer,
                [question.asked for question in questions],
                max_new_tokens=self._options.room,
                batch_size=self.batch,
                on_response=take,
                on_note=self.note,
            )
        except RuntimeError as error:
            if isinstance(error, MachineError) or not is_out_of_memory(error):
                raise
            raise InputError(
                f"generating {min(self.batch, len(questions))} responses at a time ran out of memory; lower "
                "generation.batch_size"
            ) from error
        return [answers[number] for number in range(len(questions))]

    def note(self, note: str) -> None:
        """Log a notice on how the answers are generated, and keep it for reports, once."""
        if note not in self.notes:
            self.notes.append(note)
            rank_zero_info(note)


SERVER_NAMES = OptionNames(
    "server",
    {
        "url": "the address in models",
        "model": "the model's name (#NAME in models, or server.model)",
        "max_tokens": "generation.max_new_tokens",
    },
)
"""Names of the options of requests to evaluated models, for messages."""


class ServedAnswerer(Answerer):
    """A model behind an OpenAI-compatible server.

    Args:
        options: address of the server, and how to send requests to it.
        generation: options of the generation; the server applies its own chat template to prompts.
    """

    def __init__(self, options: EndpointOptions, generation: GenerationOptions) -> None:
        self._endpoint = Endpoint(options, names=SERVER_NAMES)
        there = self._endpoint.facts()
        self.facts = {"model": f"{options.model} at {there['endpoint']}", "temperature": there["temperature"]}
        # Several prompts for every worker, so that few wait for the slowest one, and few answers are lost if the server
        # fails.
        self.batch = 4 * options.parallel * len(self._endpoint.urls)

    def questions(self, prompts: Sequence[EvaluationPrompt]) -> list[Question]:
        """Make each prompt the only turn of a conversation.

        Raises:
            InputError: a prompt prescribes the beginning of its answer, which not every server supports.
        """
        if any(prompt.prefill for prompt in prompts):
            raise InputError(
                f"{self.facts['model']}: attacks.prefill begins answers, which servers do not all take; leave it out, "
                "or name a folder"
            )
        return [Question([{"role": "user", "content": prompt.text}], len(prompt.text)) for prompt in prompts]

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer = ignore_answer) -> list[Answer]:
        """Request the answers from the server, several at a time.

        Raises:
            InputError: an answer could not be obtained, after retries.
        """
        answers: list[Answer] = []
        for start in range(0, len(questions), self.batch):
            asked = [question.asked for question in questions[start : start + self.batch]]
            try:
                answers += map(_served, self._endpoint.completions(asked))
            except EndpointError as error:
                for number, reply in enumerate(error.replies, start):
                    if reply is not None:
                        on_answer(number, _served(reply))
                raise
            for number in range(start, len(answers)):
                on_answer(number, answers[number])
        return answers


def _served(reply: Completion) -> Answer:
    answer = split_thought(reply.text.strip(), reply.num_tokens, reply.finished, opened=False)
    if not reply.thought:
        return answer
    thought = "\n".join(text for text in (reply.thought.strip(), answer.thought) if text)
    unfinished = answer.unfinished_thought or not (answer.text or reply.finished)
    return replace(answer, thought=thought, unfinished_thought=unfinished)


def _to_answer(template: ChatTemplate, prompt: str) -> str:
    """Return what `template` writes between a generation prompt and an answer; it closes a thought that is opened."""
    facts = template.facts(Conversation([]))
    extra = facts.extra if facts is not None and facts.plain else ""
    mark = opened_thought(prompt + extra)
    return f"{extra}\n</{mark}>\n\n" if mark else extra


def split_thought(text: str, num_tokens: int, finished: bool, *, opened: bool) -> Answer:
    """Separate the answer in a model's text from its thought.

    Args:
        text: everything that the model generated.
        num_tokens: number of tokens in `text`.
        finished: true if the model ended the text by itself.
        opened: true if the prompt ends within a thought, so that the text begins inside one.
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


def after_thought(reply: str) -> str:
    """Return what a chat model says after its thought; "" if the thought does not end."""
    return split_thought(reply.strip(), 0, True, opened=False).text
