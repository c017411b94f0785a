"""A preference row: a prompt and two responses, as text or as chat messages, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bdpo_pl.data.sources import Record

Message = dict[str, str]
Content = str | list[Message]
"""Text, or chat messages of the form {"role": …, "content": …}."""

BOTH_UNSAFE = "both responses unsafe"
"""Reason of a `RowError` that is a choice of what to train on, and no fault of the row."""


class RowError(ValueError):
    """A row that cannot be trained on.

    Attributes:
        reason: short name of the fault, the same for every row that has it; reports count by it.
    """

    def __init__(self, record: Record, reason: str, detail: str) -> None:
        super().__init__(f"{record.place}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class PreferenceRow:
    """One preference pair before tokenisation.

    Attributes:
        prompt: text, or messages that end with the user's turn; "" when the prompt's text is part of `rendered`.
        chosen: the preferred response.
        rejected: the dispreferred response.
        record: where the row came from.
        rendered: the texts are already in the model's own format (an implicit prompt in plain text): no template.
        category: risk category or other label, for reports.
        chosen_safe: whether the preferred response is safe; None where the data does not say.
        rejected_safe: whether the dispreferred one is, likewise.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    record: Record = field(repr=False)
    rendered: bool = False
    category: str = ""
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading elements (characters, messages, token ids) `a` and `b` share."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def check_row(row: PreferenceRow) -> PreferenceRow:
    """`row` itself if it can be trained on.

    Raises:
        RowError: an empty prompt or response, or chosen = rejected.
    """
    for name in ("prompt", "chosen", "rejected"):
        if _is_blank(getattr(row, name)):
            reason = "empty prompt" if name == "prompt" else "empty response"
            raise RowError(row.record, reason, f"field '{name}' is empty; fill it in or remove the row")
    if row.chosen == row.rejected:
        raise RowError(
            row.record, "chosen = rejected", "'chosen' and 'rejected' are the same; a pair must prefer one to the other"
        )
    return row


def order_by_safety(row: PreferenceRow) -> PreferenceRow:
    """`row` itself, or with its responses exchanged where only the preferred one is unsafe, as SafeDPO asks.

    Raises:
        RowError: both responses are unsafe (`BOTH_UNSAFE`), or it is not said of both whether they are.
    """
    if row.chosen_safe is None or row.rejected_safe is None:
        name = "chosen_safe" if row.chosen_safe is None else "rejected_safe"
        raise RowError(
            row.record, f"missing {name}", f"field '{name}' is missing or null; say whether the response is safe"
        )
    if row.chosen_safe or row.rejected_safe:
        if row.chosen_safe:
            return row
        return replace(row, chosen=row.rejected, rejected=row.chosen, chosen_safe=True, rejected_safe=False)
    raise RowError(row.record, BOTH_UNSAFE, "both responses are unsafe, and the loss prefers neither")


def parse_flag(record: Record, name: str) -> bool | None:
    """True or false in field `name`; None where it is missing or null.

    Raises:
        RowError: anything else.
    """
    value = record.fields.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise RowError(record, "wrong type", f"field '{name}' must be true or false, got {value!r:.40}")


def parse_content(record: Record, name: str, value: Any) -> Content:
    """Text or messages in field `name`, validated.

    Raises:
        RowError: missing, null, or neither text nor a list of {"role", "content"} messages with text in them.
    """
    if value is None:
        raise RowError(record, f"missing {name}", f"field '{name}' is missing or null; fill it in or remove the row")
    if isinstance(value, str):
        if not _is_unicode(value):
            raise RowError(record, "broken unicode", f"field '{name}' holds half of a surrogate pair, which is no text")
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_parse_message(record, name, message) for message in value]
    raise RowError(
        record, "wrong type", f"field '{name}' must be text or a list of chat messages, got {type(value).__name__}"
    )


def _parse_message(record: Record, name: str, message: Any) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(content, str) or not _is_unicode(content):
        raise RowError(
            record,
            "wrong message",
            f"field '{name}': each message needs a text 'role' and a text 'content', got {message!r:.80}",
        )
    return {"role": role, "content": content}


def _is_blank(content: Content) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not content or all(not message["content"].strip() for message in content)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
