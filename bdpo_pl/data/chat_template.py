"""A tokenizer's chat template: rendering of conversations, and the properties of the template.

The same object renders conversations for training, scoring, generation and attacks, so that a prompt has the same token
ids wherever it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from bdpo_pl.data.control_tokens import ControlTokens, Ids, Spelled
from bdpo_pl.data.tokenizer_like import TokenizerLike

Message = dict[str, Any]
"""A chat message: `role`, `content`, and other keys that the template reads (`tool_calls`, `reasoning_content`, …)."""

PINNED_DATE = date(2024, 7, 26)
"""Date that replaces today's date in a template: the day that Llama's templates use by default."""

# Any words will do that occur in no template and that templates leave unchanged.
_SENTINEL = "zqsentinel{}qz"
_OPEN_THOUGHT = re.compile(r"<(think(?:ing)?)>\s*$")
THOUGHT_MARK = re.compile(r"</?think(?:ing)?>")
_PLAIN = (str, bool, int, float, type(None))
_NO_KEY = ""
_OF_DICTS = frozenset(dir(dict))
_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template.

    Attributes:
        messages: turns in order.
        tools: descriptions of the functions that the model may call.
        kwargs: further variables of the template, for this conversation only.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def then(self, messages: Sequence[Message]) -> Conversation:
        """Return the conversation with `messages` appended."""
        return Conversation([*self.messages, *messages], self.tools, self.kwargs)


@dataclass(frozen=True)
class TurnFacts:
    """The text that a template writes around an assistant's answer to a user's question.

    Attributes:
        header: text that opens the assistant's turn although the template ignores `add_generation_prompt`; ""
            otherwise.
        extra: text between the generation prompt and the answer, such as an empty thought.
        end: text after the answer.
        after_user: text between the user's words and the answer, according to the generation prompt.
        plain: true if `extra`, `end` and the generation prompt fit together, so that answers can be cut by them.
    """

    header: str
    extra: str
    end: str
    after_user: str
    plain: bool


class ChatTemplate:
    """A tokenizer's chat template and the variables with which it is rendered.

    Args:
        tokenizer: tokenizer of the model; it has a chat template.
        kwargs: variables for all conversations (`enable_thinking`, `date_string`, …).
    """

    def __init__(self, tokenizer: TokenizerLike, kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.source = tokenizer.chat_template
        self.kwargs = dict(kwargs or {})
        self.special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._templates: dict[bool, str] = {}
        self._variables = {**self.special_tokens, **self.kwargs}
        self._is_plain = all(map(_is_plain, self._variables.values()))
        self._facts: dict[str, TurnFacts | None] = {}

    @cached_property
    def _compiled(self) -> Any:
        return _compiled(self._template(False))

    def render(self, conversation: Conversation, *, generation: bool = False) -> str:
        """Render the conversation with the template; with `generation`, only up to the beginning of the answer.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        return self._render(conversation, generation, self.wants_parts)

    def _render(self, conversation: Conversation, generation: bool, in_parts: bool) -> str:
        messages = conversation.messages
        if in_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        elif self._is_plain and _is_simple(conversation) and self._compiled is not None:
            # Plain texts need none of what transformers prepares, which takes longer than the rendering itself.
            return str(
                self._compiled.render(
                    messages=list(messages),
                    tools=None,
                    documents=None,
                    add_generation_prompt=generation,
                    **self._variables,
                )
            )
        # Equals `apply_chat_template` for messages that are plain data already, in half the time.
        (text,), _ = render_jinja_template(
            conversations=[list(messages)],
            tools=list(conversation.tools) if conversation.tools else None,
            chat_template=self._template(bool(conversation.tools)),
            add_generation_prompt=generation,
            **{**self.special_tokens, **self.kwargs, **conversation.kwargs},
        )
        return str(text)

    def prompt(self, conversation: Conversation) -> str:
        """Return the conversation up to where the assistant's answer begins.

        If a template ignores `add_generation_prompt`, the model would have to open its own turn, so the text with which
        the template opens the assistant's turns is appended here.
        """
        text = self.render(conversation, generation=True)
        facts = self.facts(conversation)
        return text + facts.header if facts is not None else text

    def facts(self, conversation: Conversation) -> TurnFacts | None:
        """Return the text around an answer, measured once for each set of variables; None if the template refuses."""
        tools = conversation.tools
        key = _NO_KEY
        if tools or conversation.kwargs:
            key = json.dumps([conversation.kwargs, bool(tools)], sort_keys=True, default=str)
        if key not in self._facts:
            self._facts[key] = self._probe(Conversation([], tools, conversation.kwargs))
        return self._facts[key]

    @cached_property
    def wants_parts(self) -> bool:
        """True if the template reads contents only as lists of parts, as templates of models with image input may."""
        asked = Conversation([{"role": "user", "content": _SENTINEL.format(0)}])
        for in_parts in (False, True):
            try:
                text = self._render(asked, False, in_parts)
                # A template that does not know parts may write the list itself, as a text.
                if _SENTINEL.format(0) in text and not re.search(r"""\{\s*["']type["']""", text):
                    return in_parts
            except Exception:  # noqa: S112 - a template may refuse any conversation, with an error of its own
                continue
        return False

    @cached_property
    def end_of_earlier_turn(self) -> str | None:
        """Added token that ends an assistant's turn followed by another turn; None if there is none."""
        question, answer = _SENTINEL.format(0), _SENTINEL.format(1)
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ]
        try:
            text = self.render(Conversation(turns))
        except Exception:  # a template may refuse any conversation, with an error of its own
            return None
        between = text.partition(answer)[2].partition(question)[0]
        found = [(between.find(name), -len(name), name) for name in self._added if name in between]
        return min(found)[2] if found else None

    @cached_property
    def writes_date(self) -> bool:
        """True if the template requests today's date."""
        return "strftime_now" in self._all_text

    @cached_property
    def _all_text(self) -> str:
        return self.source if isinstance(self.source, str) else "\n".join((self.source or {}).values())

    def mentions(self, name: str) -> bool:
        """Return true if the template's source names a variable or key."""
        return name in self._all_text

    def markers(self) -> set[str]:
        """Return the added tokens that the template writes around a user's turn, special or not."""
        try:
            turns = Conversation([{"role": "user", "content": _SENTINEL.format(0)}])
            text = self.render(turns) + self.render(turns, generation=True)
        except Exception:  # a template may refuse any conversation, with an error of its own
            return set()
        return {name for name in self._added if name in text and not THOUGHT_MARK.fullmatch(name)}

    def written(self) -> set[str]:
        """Return the added tokens that the template's source names, without those around thoughts."""
        return {name for name in self._added if name in self._all_text and not THOUGHT_MARK.fullmatch(name)}

    @cached_property
    def _added(self) -> set[str]:
        names = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        return {name for name in names if name.strip()}

    def _template(self, tools: bool) -> str:
        """Return the template's source with pinned dates."""
        if tools not in self._templates:
            source = self.tokenizer.get_chat_template(None, tools=[{}] if tools else None)
            written = self.kwargs.get("date_string")

            def pinned(match: re.Match[str]) -> str:
                return json.dumps(str(written) if written else PINNED_DATE.strftime(match["format"]))

            self._templates[tools] = _DATE.sub(pinned, source)
        return self._templates[tools]

    def _probe(self, blank: Conversation) -> TurnFacts | None:
        question, answer = _SENTINEL.format(0), _SENTINEL.format(1)
        asked = blank.then([{"role": "user", "content": question}])
        try:
            without, prompt = self.render(asked), self.render(asked, generation=True)
            whole = self.render(asked.then([{"role": "assistant", "content": answer}]))
        except Exception:  # a template may refuse any conversation, with an error of its own
            return None
        before, found, end = whole.partition(answer)
        head, _, after_user = prompt.rpartition(question)
        if not found or answer in end or (not head and not prompt.startswith(question)):
            return None
        header = ""
        if prompt == without and before.startswith(prompt):
            # The blank before an answer belongs to it, because tokenizers join it to the following word.
            header = before[len(prompt) :].rstrip(" ")
        opened = prompt + header
        plain = before.startswith(opened)
        extra = before[len(opened) :] if plain else ""
        return TurnFacts(header, extra, end, after_user + header, plain)

    def around(self, prompt: Conversation, response: Message, thought: str) -> tuple[str, str, str] | None:
        """Return the text that this rendering puts around the answer; None if a text does not occur in it.

        Args:
            prompt: conversation up to the user's last turn.
            response: message of the assistant.
            thought: beginning of its content, which the template may move or drop.

        Returns:
            Text that follows the user's last words in the generation prompt; text between these words and the answer in
            the whole conversation; text that follows the answer there.
        """
        question, answer = _SENTINEL.format(0), _SENTINEL.format(1)
        asked = Conversation(
            [*prompt.messages[:-1], {**prompt.messages[-1], "content": question}], prompt.tools, prompt.kwargs
        )
        opened = self.prompt(asked)
        whole = self.render(asked.then([{**response, "content": thought + answer}]))
        _, found, after = opened.rpartition(question)
        before, found_answer, end = whole.rpartition(answer)
        _, found_again, between = before.rpartition(question)
        return (after, between, end) if found and found_answer and found_again else None


def _compiled(source: str) -> Any:
    """Return a template compiled in transformers' sandbox; None in a version that keeps the sandbox elsewhere.

    The sandbox asks of each attribute that a template reads whether it is safe, which takes a third of the rendering.
    The answer follows from the name and the type of the object, so it is kept by these. A key of a message is no
    attribute, so it is read at once.
    """
    compile_ = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compile_ is None:
        return None
    environment = compile_(source).environment.overlay()
    ask = environment.is_safe_attribute
    known: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(obj: object, attribute: str, value: object) -> bool:
        key = type(obj), attribute
        if key not in known:
            known[key] = ask(obj, attribute, value)
        return known[key]

    read = environment.getattr

    def read_attribute(obj: object, name: str) -> Any:
        if type(obj) is dict and name not in _OF_DICTS:
            return obj[name] if name in obj else environment.undefined(obj=obj, name=name)
        return read(obj, name)

    environment.is_safe_attribute, environment.getattr = is_safe_attribute, read_attribute
    return environment.from_string(source)


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is list and all(type(item) in _PLAIN for item in value))


def _is_simple(conversation: Conversation) -> bool:
    """Return true if a conversation is texts of roles and nothing else."""
    if conversation.tools or conversation.kwargs:
        return False
    return all(
        len(m) == 2 and type(m.get("role")) is str and type(m.get("content")) is str for m in conversation.messages
    )


def opened_thought(prompt: str) -> str | None:
    """Return the name of the mark, as `think`, if a generation prompt ends within a thought; None if it does not."""
    mark = _OPEN_THOUGHT.search(prompt)
    return None if mark is None else mark[1]


class ChatEncoder:
    """An encoder of conversations by a tokenizer's chat template. Control tokens that texts spell remain text.

    Args:
        tokenizer: tokenizer of the model.
        kwargs: variables of the template, as in `ChatTemplate`.
    """

    def __init__(self, tokenizer: TokenizerLike, kwargs: Mapping[str, Any] | None = None) -> None:
        self.template = ChatTemplate(tokenizer, kwargs)
        has_template = bool(tokenizer.chat_template)
        self.control = ControlTokens(
            tokenizer,
            self.template.markers() if has_template else (),
            self.template.written() if has_template else (),
        )

    def prompts(self, conversations: Sequence[Conversation]) -> list[Ids]:
        """Return the token ids of conversations up to where the assistant's answer begins."""
        protected = [self.protect(conversation) for conversation in conversations]
        texts = [self.template.prompt(conversation) for conversation, _ in protected]
        return self.control.encode(texts, [spelled for _, spelled in protected])

    def texts(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[Ids]:
        """Return the token ids of texts without a template around them."""
        spelled = [Spelled() for _ in texts]
        protected = [self.control.protect(text, found) for text, found in zip(texts, spelled, strict=True)]
        return self.control.encode(protected, spelled, add_special_tokens=add_special_tokens)

    @cached_property
    def end_of_turn(self) -> int | None:
        """Added token that the template puts directly after the assistant's words; None if there is none."""
        tokenizer = self.template.tokenizer
        facts = self.template.facts(Conversation([])) if tokenizer.chat_template else None
        ids = self.control.encode([facts.end.lstrip()])[0] if facts is not None and facts.end.strip() else []
        return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None

    def protect(self, conversation: Conversation, spelled: Spelled | None = None) -> tuple[Conversation, Spelled]:
        """Return the conversation with placeholders for the control tokens that it spells, and the replaced texts."""
        spelled = Spelled() if spelled is None else spelled
        protect = self.control.protect
        messages = [
            {
                key: value if key == "role" else protect(value, spelled, by_model=message["role"] == "assistant")
                for key, value in message.items()
            }
            for message in conversation.messages
        ]
        tools = protect(conversation.tools, spelled) if conversation.tools else conversation.tools
        # Variables of one conversation come with the data, like its messages.
        kwargs = {name: protect(value, spelled) for name, value in conversation.kwargs.items()}
        return Conversation(messages, tools, kwargs), spelled


_ATTRIBUTE = "_bdpo_pl_chat_encoder"


def chat_encoder(tokenizer: TokenizerLike, kwargs: Mapping[str, Any] | None = None) -> ChatEncoder:
    """Return the encoder of `tokenizer`, created once for each template and set of variables.

    Args:
        tokenizer: tokenizer of the model.
        kwargs: variables of the template from now on; None keeps those given last.
    """
    known: ChatEncoder | None = getattr(tokenizer, _ATTRIBUTE, None)
    wanted = dict(kwargs) if kwargs is not None else known.template.kwargs if known is not None else {}
    if (
        known is None
        or known.control.tokenizer is not tokenizer
        or known.template.source != tokenizer.chat_template
        or known.template.kwargs != wanted
        or known.template.special_tokens != tokenizer.special_tokens_map
    ):
        known = ChatEncoder(tokenizer, wanted)
        setattr(tokenizer, _ATTRIBUTE, known)
    return known
