"""Chat messages of data sets, checked and converted to one form.

Roles and contents are checked here; other keys of a message (`tool_calls`, `reasoning_content`, `name`, …) are kept for
the chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bdpo_pl.data.chat_template import Message
from bdpo_pl.data.sources import Record

USER_ROLES = ("user", "tool", "function", "ipython")
"""Roles of messages that an assistant's answer may follow."""
ROLES = ("system", "developer", *USER_ROLES, "assistant")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names of an assistant's thoughts in data sets and templates."""

_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "chatgpt": "assistant", "bot": "assistant"}
_THOUGHT = re.compile(r"\s*<(think(?:ing)?)>(?P<thought>.*?)</\1>\s*", re.DOTALL)
# A list of mappings, or one, with the keys of messages, as JSON or as Python writes it.
_LISTED = re.compile(r"\s*(?:\[\s*)?\{")
_KEYED = re.compile(r"""["'](?:role|from)["']\s*:""")
_CONTENTS = re.compile(r"""["'](?:content|value)["']\s*:""")
# Unicode's characters that are shown as nothing (Default_Ignorable_Code_Point), control characters, blanks, and two
# letters that are drawn blank.
_VISIBLE = re.compile(
    "[^\\s\\x00-\\x1f\\x7f-\\x9f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b-\\u200f\\u202a-\\u202e"
    "\\u2060-\\u206f\\u2800\\u3164\\ufe00-\\ufe0f\\ufeff\\uffa0\\ufff0-\\ufffb\\U0001bca0-\\U0001bca3\\U0001d173-\\U0001d17a"
    "\\U000e0000-\\U000e0fff]"
)


class RowError(ValueError):
    """A row that cannot be trained on.

    Attributes:
        reason: short name of the fault, the same for all rows with this fault; reports count by it.
    """

    def __init__(self, record: Record, reason: str, detail: str) -> None:
        super().__init__(f"{record.place}: {detail}")
        self.reason = reason
        self._arguments = (record, reason, detail)

    def __reduce__(self) -> tuple[type[RowError], tuple[Record, str, str]]:
        return RowError, self._arguments


def parse_messages(record: Record, name: str, value: Sequence[object]) -> list[Message]:
    """Return the messages in field `name`.

    Raises:
        RowError: a message has no role or content of a known kind.
    """
    return [parse_message(record, name, message) for message in value]


def parse_message(record: Record, name: str, message: object) -> Message:
    """Return one message, of the form {"role": …, "content": …} or ShareGPT's {"from": …, "value": …}.

    Contents in parts become one text; nulls are removed; arguments of tool calls become mappings.

    Raises:
        RowError: no known role, no text, or a part that is not text.
    """
    fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
    if "role" not in fields and "from" in fields and "value" in fields:
        fields["role"] = _our_role(fields.pop("from"))
        fields["content"] = fields.pop("value")
    role, content = fields.get("role"), fields.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = _join(record, name, content)
    calls = fields.get("tool_calls") if isinstance(fields.get("tool_calls"), Sequence) else None
    if content is None and (calls or any(isinstance(fields.get(key), str) for key in REASONING_KEYS)):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str) or not is_unicode(content):
        raise RowError(
            record,
            "wrong message",
            f"field '{name}': each message needs a text 'role' and a text 'content', got {_keys(message)}",
        )
    if role not in ROLES:
        raise RowError(
            record,
            "unknown role",
            f"field '{name}': a message has the role {role!r:.40}; known are {', '.join(ROLES)}",
        )
    parsed = {key: value for key, value in fields.items() if key not in ("role", "content", "tool_calls")}
    for key, value in parsed.items():
        if isinstance(value, str) and not is_unicode(value):
            raise RowError(record, "broken unicode", f"field '{name}': {key!r} holds half of a surrogate pair")
    if calls:
        parsed["tool_calls"] = [_parse_call(record, name, call) for call in calls]
    return {"role": role, "content": content, **parsed}


def split_thought(content: str) -> tuple[str, str]:
    """Return (the thought with which `content` begins, including tags and blanks, or ""; the rest)."""
    found = _THOUGHT.match(content)
    return (content[: found.end()], content[found.end() :]) if found else ("", content)


def without_thought(message: Message) -> Message:
    """Return an assistant's message without its thoughts."""
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    return {**kept, "content": split_thought(message["content"])[1]}


def with_marks(message: Message, thought: str, words: str) -> Message:
    """Return an assistant's message with `thought` in place of its thought and `words` in place of its words."""
    inline, rest = split_thought(message["content"])
    if found := _THOUGHT.match(inline):
        inline = inline[: found.start("thought")] + _within(found["thought"], thought) + inline[found.end("thought") :]
    named = {key: message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key].strip()}
    thoughts = {key: _within(value, thought) for key, value in named.items()}
    return {**message, **thoughts, "content": inline + _within(rest, words)}


def thought_of(message: Message) -> str:
    """Return the text of an assistant's thoughts, "" if there are none."""
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            return str(message[key]).strip()
    found = _THOUGHT.match(message["content"])
    return found["thought"].strip() if found else ""


def without_nulls(value: object) -> Any:
    """Return `value` without the nulls with which Parquet fills up a mapping."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def messages_in_text(record: Record, name: str, text: str) -> list[object] | None:
    """Return the chat messages that field `name` holds as a text, as tables without lists have them; None: other text.

    Raises:
        RowError: they are not written as JSON.
    """
    if not _LISTED.match(text) or not _KEYED.search(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # Other texts may begin like this too, but hardly with both keys.
        if text.lstrip()[0] != "[" or not _CONTENTS.search(text):
            return None
        raise RowError(
            record,
            "messages as a text that is not JSON",
            f"field '{name}' is a text that spells a list of chat messages, and not in JSON; write it with json.dumps, "
            "or give a file that holds lists (.jsonl, .parquet)",
        ) from None
    value = [value] if isinstance(value, dict) else value
    return (
        value
        if all(map(_is_message, value)) and _our_role(value[0].get("role", value[0].get("from"))) in ROLES
        else None
    )


def is_blank(text: str) -> bool:
    """Return true if nothing in `text` is visible."""
    return _VISIBLE.search(text) is None


def says_nothing(message: Message) -> bool:
    """Return true if a message has neither words nor tool calls."""
    return is_blank(message["content"]) and not message.get("tool_calls")


def is_unicode(text: str) -> bool:
    """Return true if `text` can be written as UTF-8: it contains no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _join(record: Record, name: str, parts: Sequence[object]) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise RowError(
                record,
                "content that is not text",
                f"field '{name}': a message has a part of type {kind!r:.30}; only text is trained on",
            )
        texts.append(text)
    return "".join(texts)


def _parse_call(record: Record, name: str, call: object) -> Any:
    """Return a tool call whose arguments are a mapping: templates write them as JSON themselves."""
    if not isinstance(call, Mapping):
        raise RowError(record, "wrong tool call", f"field '{name}': a tool call must be a mapping")
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(record, "wrong tool call", f"field '{name}': a tool call needs the 'name' of a function")
    # A file of Parquet fills up the arguments of one function with those of all others, as nulls.
    function = {**without_nulls(function), **({"arguments": {}} if function.get("arguments", "") is None else {})}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = function.get("arguments")
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _within(text: str, other: str) -> str:
    """Return `other` between the blanks around `text`."""
    said = text.strip()
    return text.replace(said, other, 1) if said else other


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and ("content" in value or "value" in value or "tool_calls" in value)


def _our_role(role: object) -> object:
    """Return ShareGPT's `role` under the name that it has here; any other unchanged."""
    return _SHAREGPT.get(role, role) if isinstance(role, str) else role


def _keys(message: object) -> str:
    if isinstance(message, Mapping):
        return f"the keys {', '.join(map(repr, message)) or 'none'}"[:80]
    return type(message).__name__
