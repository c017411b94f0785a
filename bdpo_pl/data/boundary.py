"""Beginning and end of a response in the output of a chat template, proven for each conversation.

The proof: the prompt is exactly what generation would start from, the response's text is the data's text, no text of
another turn is trained on, and the response ends as generation ends. If a template writes a conversation differently
from its generation prompt, the response is placed behind the generation prompt if it can be identified; otherwise the
row is refused with a reason.

Positions count characters in the rendered text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bdpo_pl.data.chat_template import ChatTemplate, Conversation, Message, opened_thought
from bdpo_pl.data.messages import USER_ROLES, RowError, thought_of, with_marks, without_thought
from bdpo_pl.data.messages import split_thought as split_thought_of
from bdpo_pl.data.rows import common_prefix_length
from bdpo_pl.data.sources import Record

Thoughts = Literal["train", "mask", "strip"]

_TOOL_ROLES = tuple(role for role in USER_ROLES if role != "user")
# Any words will do that occur in no text.
_MARKS = ("zqthoughtqz", "zqwordsqz")


@dataclass(frozen=True)
class Response:
    """One response behind its prompt.

    Attributes:
        text: prompt and response, up to the token that ends the response.
        boundary: position where the prompt ends.
        spans: ranges of the response that are trained on.
        is_ended: true if `text` ends with a token that stops generation.
        moved: true if the template writes the prompt differently before an answer than before generation.
        added: text that the template puts between the prompt and the answer.
        has_thought: true if the response contains thoughts.
    """

    text: str
    boundary: int
    spans: list[tuple[int, int]]
    is_ended: bool
    moved: bool = False
    added: str = ""
    has_thought: bool = False

    @property
    def is_masked(self) -> bool:
        """True if part of the response is not trained on."""
        return self.spans != [(self.boundary, len(self.text))]


class Cutter:
    """A cutter of rendered conversations at their responses.

    Args:
        template: template that renders the conversations.
        stops: texts of the tokens that stop generation.
        thoughts: treatment of thoughts in responses: trained on (`train`), read but not trained on (`mask`), or removed
            (`strip`).
    """

    def __init__(self, template: ChatTemplate, stops: set[str], thoughts: Thoughts) -> None:
        self.template = template
        self.stops = sorted(stops)
        self.thoughts = thoughts

    def prompt(self, record: Record, prompt: Conversation) -> str:
        """Return the generation prompt.

        Raises:
            RowError: the template omits part of the prompt.
        """
        text = self.template.prompt(prompt)
        for tool in prompt.tools or ():
            name = _tool_name(tool)
            if name is not None and name not in text:
                raise RowError(
                    record,
                    "left out by the template",
                    "the chat template writes no tools; leave out the column (data.load.ignore='[tools]'), or give a "
                    "template that writes them (data.chat_template)",
                )
        self._check_written(record, prompt, text)
        return text

    def _check_written(self, record: Record, prompt: Conversation, text: str) -> None:
        """Raise `RowError` if `text`, the generation prompt, lacks words, calls of tools, or what these answered."""
        for message in prompt.messages:
            if message["role"] in ("system", "developer", "user") and message["content"].strip() not in text:
                raise RowError(
                    record,
                    "left out by the template",
                    f"the chat template leaves out (a part of) the {message['role']} message; put its text into the "
                    "user's turn, or give a template that writes it (data.chat_template)",
                )
            # Templates leave thoughts out of earlier turns on purpose.
            if message["role"] == "assistant" and not any(said in text for said in _without_thoughts(message)):
                raise _left_out(record, "(a part of) an earlier turn of the assistant's")
        marks: list[tuple[str, str, str]] = []  # mark, what it stands for, and its name

        def mark(stands_for: str, name: str) -> str:
            marks.append((f"zqmark{len(marks)}qz", stands_for, name))
            return marks[-1][0]

        def marked(message: Message) -> Message:
            if message["role"] == "assistant" and message.get("tool_calls"):
                calls = [_renamed(call, mark(str(_tool_name(call)), "tool calls")) for call in message["tool_calls"]]
                return {**message, "tool_calls": calls}
            if message["role"] in _TOOL_ROLES and message["content"].strip():
                said = message["content"].strip()
                return {**message, "content": mark(said, f"(a part of) a message of the role {message['role']!r}")}
            return message

        messages = [marked(message) for message in prompt.messages]
        if not marks:
            return
        # The name of a function is among the tools too, and a template may write an answer as JSON: so not the texts
        # are looked for, but other texts in their places.
        try:
            seen = self.template.prompt(Conversation(messages, prompt.tools, prompt.kwargs))
        except Exception:  # of whatever kind: the template looks into the texts
            seen, marks = text, [(stands_for, stands_for, name) for _, stands_for, name in marks]
        for found, _, name in marks:
            if found not in seen:
                raise _left_out(record, name)

    def response(self, record: Record, prompt: Conversation, opened: str, response: list[Message]) -> Response:
        """Return the response behind its prompt.

        Args:
            record: origin of the row, for error messages.
            prompt: conversation up to where the response begins.
            opened: generation prompt of `prompt`.
            response: the assistant's turn and all that follows, up to the assistant's last turn.

        Raises:
            RowError: the response cannot be separated from the text around it.
            jinja2.TemplateError: the template refuses the conversation.
        """
        if self.thoughts == "strip":
            response = [without_thought(m) if m["role"] == "assistant" else m for m in response]
        whole = self.template.render(prompt.then(response))
        if len(response) > 1 or response[0].get("tool_calls"):
            return self._turns(record, prompt, opened, response, whole)
        thought = thought_of(response[0])
        facts = self.template.facts(prompt)
        if not thought and facts is not None and facts.plain and whole.startswith(opened):
            for said in _variants(response[0]["content"]):
                if whole[len(opened) :] == facts.extra + said + facts.end:
                    return self._single(opened, facts.extra, said, facts.end, False, False)
        return self._alone(record, prompt, opened, response[0], whole, thought)

    def _alone(
        self, record: Record, prompt: Conversation, opened: str, message: Message, whole: str, thought: str
    ) -> Response:
        """Cut one answer, by the text that the template puts around it in this conversation."""
        inline, rest = split_thought_of(message["content"])
        around = self.template.around(prompt, message, inline)
        if around is None:
            raise RowError(
                record,
                "left out by the template",
                "the chat template leaves out the answer or the user's last turn; give another (data.chat_template)",
            )
        after, between, end = around
        if not between.startswith(after):
            after = after.rstrip(" ")
        if not between.startswith(after):
            raise RowError(record, *_otherwise(after, self.template, bool(thought)))
        extra = between[len(after) :]
        if thought and thought not in extra + after:
            raise RowError(
                record,
                "thoughts left out by the template",
                "the response has thoughts that the chat template does not write; take them out with "
                "data.thoughts=strip, or give a template that writes them (data.chat_template)",
            )
        for said in _variants(rest):
            if whole.endswith(between + said + end):
                return self._single(opened, extra, said, end, not whole.startswith(opened), bool(thought))
        raise RowError(
            record,
            "changed by the template",
            "the chat template changes the answer's text, so the answer cannot be separated from the prompt; give "
            "another template (data.chat_template) or leave the row out",
        )

    def _single(self, opened: str, extra: str, said: str, end: str, moved: bool, has_thought: bool) -> Response:
        closing, is_ended = self._closing(end)
        text = opened + extra + said + closing
        start = len(opened)
        # Text that a template always puts before an answer is not generated by the model. A blank belongs to the
        # answer.
        if extra.strip() and (not has_thought or self.thoughts == "mask"):
            start += len(extra)
        return Response(
            text,
            len(opened),
            [(start, len(text))],
            is_ended,
            moved,
            "" if has_thought or not extra.strip() else extra,
            has_thought,
        )

    def _closing(self, end: str) -> tuple[str, bool]:
        """Return the part of `end` that belongs to a response: up to the first token that stops generation, if any."""
        place, stop = self._stop(end, 0)
        # Words before the stop belong to the next turn or to the template.
        if stop and not end[:place].strip():
            return end[: place + len(stop)], True
        return "", False

    def _stop(self, text: str, start: int) -> tuple[int, str]:
        found = [(place, stop) for stop in self.stops if (place := text.find(stop, start)) >= 0]
        return min(found, key=lambda at: (at[0], -len(at[1])), default=(len(text), ""))

    def _turns(
        self, record: Record, prompt: Conversation, opened: str, response: list[Message], whole: str
    ) -> Response:
        """Cut several turns, or one with tool calls. Only the assistant's turns are trained on."""
        facts = self.template.facts(prompt)
        extra = facts.extra if facts is not None and facts.plain and facts.extra.strip() else ""
        spans: list[tuple[int, int]] = []
        has_thought = False
        is_ended = True
        for k, message in self._said(response):
            before = opened if k == 0 else self.template.prompt(prompt.then(response[:k]))
            if not whole.startswith(before):
                raise RowError(record, *_otherwise("", self.template))
            if 0 < k == len(response) - 1:
                self._check_written(record, prompt.then(response[:k]), before)
            start = len(before)
            is_last = k == len(response) - 1
            limit = len(whole) if is_last else self._next_turn(record, prompt.then(response[: k + 1]), whole, start)
            end, stop = self._stop(whole[:limit], start)
            if not stop:
                # The turn has no end that would stop generation, so only its words are trained on.
                said = message["content"].strip()
                place = whole.find(said, start, limit) if said and not message.get("tool_calls") else -1
                if place < 0:
                    raise RowError(record, *_otherwise("", self.template))
                end = place + len(said)
                is_ended = not is_last
            part = whole[start:end]
            thought = thought_of(message)
            has_thought |= bool(thought)
            self._check_part(record, message, part, thought)
            if thought and self.thoughts == "mask":
                start = self._after_thought(record, prompt, response, k, whole)
            elif not thought and extra and part.startswith(extra):
                start += len(extra)
            spans.append((start, end + len(stop)))
        # What the template puts before a lone turn with thoughts is not all that is left out of training.
        added = "" if has_thought and len(spans) == 1 else extra
        return Response(whole[: spans[-1][1]], len(opened), spans, is_ended, added=added, has_thought=has_thought)

    def _after_thought(self, record: Record, prompt: Conversation, response: list[Message], k: int, whole: str) -> int:
        """Return where the words or calls of turn `k` begin in `whole`, behind its thought and what closes it.

        Both are found by rendering other texts in their places, because the words may occur in the thought.
        """
        message = response[k]
        thought, said = thought_of(message), split_thought_of(message["content"])[1].strip()

        def rendered(words: str) -> tuple[str, str]:
            turns = [*response[:k], with_marks(message, _MARKS[0], words), *response[k + 1 :]]
            head, _, rest = self.template.render(prompt.then(turns)).partition(_MARKS[0])
            return head, rest

        head, rest = rendered(_MARKS[1])
        closing, found, tail = rest.partition(_MARKS[1])
        if found and said and whole == head + thought + closing + said + tail:
            return len(head + thought + closing)
        if found and not said:
            _, rest = rendered("")
            shared = common_prefix_length(rest, closing)
            if whole == head + thought + rest and shared >= len(closing.rstrip()):
                return len(head + thought) + shared
        raise RowError(
            record,
            "thoughts that cannot be masked",
            "the chat template writes a turn's thoughts so that they cannot be separated from its words; take them "
            "out with data.thoughts=strip, or train on them with data.thoughts=train",
        )

    def _next_turn(self, record: Record, upto: Conversation, whole: str, start: int) -> int:
        """Return where the turn that begins at `start` ends, in a conversation that continues after it."""
        alone = self.template.render(upto).rstrip()
        if whole.startswith(alone):
            return len(alone)
        # The template writes a turn differently once it is not the last: it ends with the token that ends turns.
        ends = [stop for stop in (*self.stops, self.template.end_of_earlier_turn) if stop]
        found = [place + len(stop) for stop in ends if (place := whole.find(stop, start)) >= 0]
        if not found:
            raise RowError(record, *_otherwise("", self.template))
        return min(found)

    def _said(self, response: list[Message]) -> Iterator[tuple[int, Message]]:
        return ((k, message) for k, message in enumerate(response) if message["role"] == "assistant")

    def _check_part(self, record: Record, message: Message, part: str, thought: str) -> None:
        said = split_thought_of(message["content"])[1].strip()
        missing = said not in part and "the words"
        missing = missing or (thought not in part and "the thoughts")
        for call in message.get("tool_calls") or ():
            missing = missing or (str(_tool_name(call)) not in part and "the tool calls")
        if missing:
            remedy = "data.thoughts=strip takes thoughts out; else " if missing == "the thoughts" else ""
            raise RowError(
                record,
                "left out by the template",
                f"the chat template leaves out {missing} of a turn of the assistant's; {remedy}give a template that "
                "writes them (data.chat_template) or leave the row out",
            )


def _variants(text: str) -> Iterator[str]:
    """Yield `text` in the forms in which templates write it: unchanged, or stripped."""
    yield text
    yield text.strip()
    yield text.rstrip()
    yield text.lstrip()


def _without_thoughts(message: Message) -> Iterator[str]:
    """Yield the words of an assistant's turn in the forms in which templates write them in earlier turns."""
    said = split_thought_of(message["content"])[1]
    yield said.strip()
    # An answer to a generation prompt that opens the thought does not open it again.
    yield said.rpartition("</think>")[2].strip()


def _renamed(call: dict[str, Any], name: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def _left_out(record: Record, what: str) -> RowError:
    return RowError(
        record,
        "left out by the template",
        f"the chat template leaves out {what}; give a template that writes them (data.chat_template) or leave the row "
        "out",
    )


def _tool_name(tool: object) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _thought_of_prompt(after: str) -> str:
    return after[after.rindex("<") :]


def _otherwise(after: str, template: ChatTemplate, has_thought: bool = False) -> tuple[str, str]:
    """Return reason and detail for a conversation that continues differently from its generation prompt."""
    if has_thought:
        return (
            "thoughts against the generation prompt",
            "the response has thoughts, and the chat template's generation prompt leaves no place for them where the "
            "template writes them; take them out with data.thoughts=strip, or give another template "
            "(data.chat_template) or variable (data.chat_template_kwargs='{enable_thinking: true}')",
        )
    if opened_thought(after):
        switch = next((name for name in ("enable_thinking", "thinking") if template.mentions(name)), None)
        remedy = (
            f"data.chat_template_kwargs='{{{switch}: false}}'"
            if switch
            else "data.chat_template=FILE, a copy of the template whose generation prompt does not end with "
            f"{_thought_of_prompt(after)!r}"
        )
        return (
            "the generation prompt opens a thought",
            "the chat template's generation prompt opens a thought, and the response has none, so generation would "
            f"begin from another prompt than training; turn thinking off with {remedy}",
        )
    return (
        "written differently by the template",
        "the chat template writes the conversation differently once it has a response, so the response cannot be "
        "separated from the prompt; give another template (data.chat_template), or one answer in a row",
    )
