"""A preference row: a prompt and two responses, as text or as chat messages, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from bdpo_pl.data.chat_template import Message
from bdpo_pl.data.messages import (
    USER_ROLES,
    RowError,
    is_blank,
    is_unicode,
    messages_in_text,
    parse_messages,
    says_nothing,
)
from bdpo_pl.data.sources import Record

__all__ = ["BOTH_UNSAFE", "Content", "Message", "PreferenceRow", "RowError", "Turns"]

Content = str | list[Message]
"""Text or chat messages."""

BOTH_UNSAFE = "both responses unsafe"
"""Reason of a `RowError` that is due to a choice of training data, not to a fault of the row."""

# No real response is this long; a single text of this size would occupy a tokenizer for minutes.
MAX_CHARACTERS = 1_000_000

_LARGEST_WEIGHT = 3.4028234e38
"""Largest number in float32, in which weights are kept."""


@dataclass(frozen=True)
class Turns:
    """A pair as chat messages, from a row whose texts are whole dialogues.

    Attributes:
        prompt: turns up to the user's last one before the responses diverge.
        chosen: the assistant's turn and all that follows it, preferred.
        rejected: the assistant's turn and all that follows it, dispreferred.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class PreferenceRow:
    """One preference pair before tokenisation.

    Attributes:
        prompt: text, or messages that end with the user's turn; "" if the prompt's text is part of `rendered`.
        chosen: the preferred response.
        rejected: the dispreferred response.
        record: record from which the row was made.
        rendered: true if the texts are dialogues in their own format, which are not rendered with a template.
        category: risk category or other label, for reports.
        chosen_safe: safety of the preferred response; None if the data does not label it.
        rejected_safe: safety of the dispreferred response, likewise.
        turns: content of a `rendered` row as messages, for a model with a chat template.
        tools: descriptions of the functions that the model may call.
        template_kwargs: variables of the chat template, for this row only.
        weight: factor of the pair's loss; None if the data has none.
        desirable: true if a single answer is good, false if it is bad; None for a pair. A single answer is always
            `chosen`, and `rejected` answers another prompt.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    record: Record = field(repr=False)
    rendered: bool = False
    category: str = ""
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    turns: Turns | None = None
    tools: Sequence[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float | None = None
    desirable: bool | None = None


def common_prefix_length(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many leading elements (characters, messages, token ids) `a` and `b` share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next((i for i in range(length) if a[i] != b[i]), length)


def check_row(row: PreferenceRow) -> PreferenceRow:
    """Return `row` itself if it can be trained on.

    Raises:
        RowError: an empty prompt or response, or chosen = rejected.
    """
    if _is_blank(row.prompt):
        raise RowError(row.record, "empty prompt", "field 'prompt' is empty; fill it in or remove the row")
    for name, content in (("chosen", row.chosen), ("rejected", row.rejected)):
        if _is_blank(content):
            where = (
                f"the answer after the prompt in '{name}'" if "prompt" not in row.record.fields else f"field '{name}'"
            )
            raise RowError(row.record, "empty response", f"{where} is empty; fill it in or remove the row")
    for name in ("chosen", "rejected"):
        if isinstance(content := getattr(row, name), list):
            check_response(row.record, name, content)
    if isinstance(row.prompt, list):
        _check_prompt(row.record, row.prompt)
    if row.chosen == row.rejected:
        raise RowError(
            row.record, "chosen = rejected", "'chosen' and 'rejected' are the same; a pair must prefer one to the other"
        )
    return row


def check_size(row: PreferenceRow) -> None:
    """Raise `RowError` if a text of `row` is so long that tokenising it would take minutes."""
    for name in ("prompt", "chosen", "rejected"):
        content = getattr(row, name)
        texts = [content] if isinstance(content, str) else [message["content"] for message in content]
        longest = max(map(len, texts), default=0)
        if longest > MAX_CHARACTERS:
            raise RowError(
                row.record,
                "text of more than a million characters",
                f"field '{name}' holds a text of {longest:,} characters, which is not a prompt or answer: shorten it, "
                "or leave the row out",
            )


def order_by_safety(row: PreferenceRow) -> PreferenceRow:
    """Return `row`, with exchanged responses if only the preferred one is unsafe, as SafeDPO requires.

    Raises:
        RowError: both responses are unsafe (`BOTH_UNSAFE`), or one of them has no safety label.
    """
    if row.chosen_safe is None or row.rejected_safe is None:
        name = "chosen_safe" if row.chosen_safe is None else "rejected_safe"
        raise RowError(
            row.record, f"missing {name}", f"field '{name}' is missing or null; say whether the response is safe"
        )
    if row.chosen_safe or row.rejected_safe:
        if row.chosen_safe:
            return row
        turns = row.turns and Turns(row.turns.prompt, row.turns.rejected, row.turns.chosen)
        return replace(
            row, chosen=row.rejected, rejected=row.chosen, turns=turns, chosen_safe=True, rejected_safe=False
        )
    raise RowError(row.record, BOTH_UNSAFE, "both responses are unsafe, and the loss prefers neither")


def parse_flag(record: Record, name: str) -> bool | None:
    """Return the true or false in field `name`; None if it is missing or null.

    Raises:
        RowError: the field contains anything else.
    """
    value = record.fields.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise RowError(record, "wrong type", f"field '{name}' must be true or false, got {value!r:.40}")


def parse_weight(record: Record) -> float | None:
    """Return the number in the column `weight`; None if there is no such column.

    Raises:
        RowError: it is null, negative, larger than a float32, or no number.
    """
    if "weight" not in record.fields:
        return None
    value = record.fields["weight"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= _LARGEST_WEIGHT:
        raise RowError(
            record,
            "wrong weight",
            "field 'weight' must be a number of at least 0 and within float32, the factor of the pair's loss; got "
            f"{value!r:.40}. If the column means something else, --data.load.ignore '[weight]' leaves it out",
        )
    return float(value)


def parse_content(record: Record, name: str, value: object) -> Content:
    """Return the validated text or messages in field `name`; messages may be written as JSON.

    Raises:
        RowError: missing, null, or neither text nor a list of {"role", "content"} messages with text in them.
    """
    if value is None:
        raise RowError(record, f"missing {name}", f"field '{name}' is missing or null; fill it in or remove the row")
    if isinstance(value, str):
        if not is_unicode(value):
            raise RowError(
                record, "broken unicode", f"field '{name}' holds half of a surrogate pair, which is not text"
            )
        written = messages_in_text(record, name, value)
        return value if written is None else parse_messages(record, name, written)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return parse_messages(record, name, value)
    raise RowError(
        record, "wrong type", f"field '{name}' must be text or a list of chat messages, got {type(value).__name__}"
    )


def _check_prompt(record: Record, prompt: list[Message]) -> None:
    last = prompt[-1]["role"]
    if last == "assistant":
        raise RowError(record, "prompt ends with the assistant", "the prompt's last turn is the assistant's")
    if last not in USER_ROLES:
        raise RowError(
            record, "no user turn", f"the prompt ends with a message of the role {last!r}, and asks nothing; add a turn"
        )


def check_response(record: Record, name: str, response: list[Message]) -> None:
    """Raise `RowError` unless the messages in field `name` are the assistant's and the turns that these answer."""
    first, last = response[0]["role"], response[-1]["role"]
    if first != "assistant" or last != "assistant":
        which, role = ("begins", first) if first != "assistant" else ("ends", last)
        raise RowError(
            record,
            "response of another role",
            f"the response in '{name}' {which} with a turn of the role {role!r}; only the assistant's words are "
            "trained on, so it must begin and end with the assistant",
        )
    if any(message["role"] in ("system", "developer") for message in response):
        raise RowError(record, "system turn in a response", f"the response in '{name}' holds a system message")
    if any(a["role"] == b["role"] == "assistant" for a, b in pairwise(response)):
        raise RowError(
            record,
            "two answers in a row",
            f"the response in '{name}' holds two turns of the assistant's in a row; generation would have stopped "
            "after the first",
        )
    if says_nothing(response[-1]):
        raise RowError(record, "empty response", f"the last answer in '{name}' is empty; fill it in or remove the row")


def _is_blank(content: Content) -> bool:
    if isinstance(content, str):
        return is_blank(content)
    return all(says_nothing(message) for message in content)
