"""The interface of a preference-data schema: recognition of its rows, and their conversion to preference rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from bdpo_pl.data.messages import without_nulls
from bdpo_pl.data.rows import (
    Content,
    Message,
    PreferenceRow,
    RowError,
    common_prefix_length,
    parse_content,
    parse_flag,
    parse_weight,
)
from bdpo_pl.data.sources import Record
from bdpo_pl.errors import InputError

if TYPE_CHECKING:
    from bdpo_pl.data.report import DataReport

SAFETY_COLUMNS = ("chosen_safe", "rejected_safe")
_CONVERSATIONS = ("messages", "conversations")

_NO_TEXT = "no text"

# Columns with content that a model should read, by this project's name of that content.
_TEXT_COLUMNS = {
    "system": "system",
    "system_prompt": "system",
    "question": "prompt",
    "instruction": "prompt",
    "query": "prompt",
    "input": "prompt",
    "context": "prompt",
    "history": "prompt",
    "conversations": "prompt",
    "messages": "prompt",
    "tools": "tools",
    "functions": "tools",
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _NO_TEXT),
}

Refuse = Callable[[RowError, Record], None]
"""A function that counts a row that cannot be trained on, or ends the run because of it."""


@dataclass
class SafeRLHFOptions:
    """The selection of pairs from PKU-SafeRLHF.

    A query is safe if both its responses are, and unsafe if one or both are not.

    Args:
        num_safe: number of safe queries to draw, one pair each; None takes every pair. The paper draws 10,000.
        num_unsafe: number of unsafe queries to draw, one pair each; None takes every pair.
        both_unsafe: treatment of a pair of two unsafe responses: `drop` it, or choose its `safer_response_id`
            (`safer`).
    """

    num_safe: int | None = None
    num_unsafe: int | None = None
    both_unsafe: Literal["drop", "safer"] = "drop"


@dataclass
class SchemaContext:
    """The input of a schema besides its records.

    Attributes:
        report: report to which the schema adds its counts.
        refuse: function called for each row that cannot be trained on.
        seed: seed of draws.
        safe_rlhf: selection of pairs from PKU-SafeRLHF.
        ignore: columns left out on purpose.
    """

    report: DataReport
    refuse: Refuse
    seed: int
    safe_rlhf: SafeRLHFOptions
    ignore: Sequence[str] = ()


@dataclass(frozen=True)
class Schema:
    """A layout of preference data.

    Attributes:
        name: name of the schema, as in `data.load.format`.
        required: columns of every row.
        reads: further columns that are read.
        is_messy: true for a published set with unusable rows, which are left out and counted by default.
        about: content of the rows, for documentation.
    """

    name: str
    required: tuple[str, ...]
    reads: tuple[str, ...] = ()
    is_messy: bool = False
    about: str = ""
    _all: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_all", frozenset((*self.required, *self.reads)))

    def recognises(self, first: Record) -> bool:
        """Return true if the file whose first record is `first` has this schema."""
        return all(column in first.fields for column in self.required)

    def parse(self, record: Record) -> PreferenceRow:
        """Return the preference row in `record`.

        Raises:
            RowError: the record cannot be trained on.
        """
        raise NotImplementedError

    def rows(self, records: Iterable[Record], context: SchemaContext) -> Iterable[PreferenceRow]:
        """Return the preference rows of `records`; rows that cannot be trained on are refused."""
        return self._parsed(records, context, self.parse)

    def _parsed(
        self, records: Iterable[Record], context: SchemaContext, parse: Callable[[Record], Any]
    ) -> Iterator[Any]:
        for record in records:
            context.report.read += 1
            try:
                row = parse(record)
            except RowError as error:
                context.refuse(error, record)
                continue
            self.check_unread(record, row, context.ignore)
            yield row

    def check_unread(self, record: Record, row: object, ignore: Sequence[str]) -> None:
        """Raise `InputError` if a column that a model should read is not read."""
        for column in _TEXT_COLUMNS.keys() & record.fields.keys() - self._all:
            value = record.fields[column]
            if column in ignore or not value or (isinstance(value, str) and not value.strip()):
                continue
            if column in _CONVERSATIONS and _is_said(record, column, row):
                continue  # the conversation once more, as in ultrafeedback_binarized
            if isinstance(row, PreferenceRow) and isinstance(value, str) and value.strip() in _words(row.prompt):
                continue
            raise InputError(f"{record.place}: column {column!r} would not be read. {_remedy(column, record)}")


def _remedy(column: str, record: Record) -> str:
    ours = _TEXT_COLUMNS[column]
    leave_out = f"--data.load.ignore '[{column}]' leaves it out"
    if ours == _NO_TEXT:
        return f"Only text is trained on: {leave_out}"
    if column in _CONVERSATIONS and "chosen" not in record.fields:
        return f"It says something else than the columns that are read: {leave_out}"
    if ours in record.fields:
        return f"There is a {ours!r} already: {leave_out}"
    return f"Read it with --data.load.columns '{{{ours}: {column}}}'; {leave_out}"


def _is_said(record: Record, column: str, row: object) -> bool:
    """Return true if the conversation in `column` is a part of one that `row` holds."""
    row = row[-1] if isinstance(row, tuple) else row
    try:
        said = parse_content(record, column, record.fields[column])
    except RowError:
        return False
    if not isinstance(said, list):
        return False
    source = getattr(row, "turns", None) or row
    prompt = _as_turns(getattr(source, "prompt", ""), "user")
    for side in ("chosen", "rejected", "answer"):
        whole = [*prompt, *_as_turns(getattr(source, side, ""), "assistant")]
        if any(whole[i : i + len(said)] == _as_turns(said, "") for i in range(len(whole))):
            return True
    return False


def _as_turns(content: Content, role: str) -> list[tuple[str, str, object]]:
    messages = [{"role": role, "content": content}] if isinstance(content, str) else content
    return [(m["role"], m["content"].strip(), m.get("tool_calls")) for m in messages]


def _words(prompt: Content) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


class _More(TypedDict, total=False):
    tools: Sequence[Any] | None
    rendered: bool


def make_row(
    record: Record, prompt: Content, chosen: Content, rejected: Content, **more: Unpack[_More]
) -> PreferenceRow:
    """Return the row of these texts and of the columns that are common to all schemas.

    These are `category`, `chosen_safe`, `rejected_safe`, `weight`, `system`, `tools` and `chat_template_kwargs`.

    Raises:
        RowError: one of them contains an invalid value.
    """
    chosen_safe, rejected_safe = (parse_flag(record, name) for name in SAFETY_COLUMNS)
    fields: dict[str, Any] = {
        "category": _category(record),
        "chosen_safe": chosen_safe,
        "rejected_safe": rejected_safe,
        "tools": _tools(record, record.fields.get("tools")),
        "template_kwargs": _template_kwargs(record),
        "weight": parse_weight(record),
        **more,
    }
    return PreferenceRow(with_system(record, prompt), chosen, rejected, record, **fields)


def with_system(record: Record, prompt: Content) -> Content:
    """Return `prompt` preceded by the text of the `system` column.

    Raises:
        RowError: the column is not text, or the prompt has another system message.
    """
    value = record.fields.get("system")
    if value is None or (isinstance(value, str) and not value.strip()):
        return prompt
    system = parse_content(record, "system", value)
    if not isinstance(system, str):
        raise RowError(record, "wrong type", f"field 'system' must be text, got {type(system).__name__}")
    turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if turns and turns[0]["role"] in ("system", "developer"):
        if turns[0]["content"].strip() != system.strip():
            raise RowError(record, "two system messages", "field 'system' differs from the prompt's system message")
        return turns
    return [{"role": "system", "content": system}, *turns]


def split_conversations(
    record: Record, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return (prompt, chosen, rejected) of two whole conversations: their common beginning, and the rest of each.

    Raises:
        RowError: they do not diverge at a turn of the assistant.
    """
    cut = common_prefix_length(chosen, rejected)
    parting = [turns[cut]["role"] if cut < len(turns) else "nothing" for turns in (chosen, rejected)]
    if chosen == rejected:
        raise RowError(
            record, "chosen = rejected", "'chosen' and 'rejected' are the same; a pair must prefer one to the other"
        )
    if cut == 0 and parting != ["assistant", "assistant"]:
        raise RowError(
            record,
            "no prompt",
            "there is no 'prompt', and 'chosen' and 'rejected' begin with nothing in common; add a 'prompt' column",
        )
    if parting != ["assistant", "assistant"]:
        role = next(role for role in parting if role != "assistant")
        raise RowError(
            record,
            "parted by another than the assistant",
            f"'chosen' and 'rejected' part at turn {cut + 1}, where one has {role} and not the assistant; only the "
            "assistant's words can be preferred",
        )
    while cut > 0 and chosen[cut - 1]["role"] == "assistant":
        cut -= 1
    if cut == 0:
        raise RowError(record, "no prompt", "'chosen' and 'rejected' begin with the assistant; add a 'prompt' column")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _category(record: Record) -> str:
    value = record.fields.get("category")
    labels = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(label, str | int) and not isinstance(label, bool) for label in labels):
        raise RowError(
            record,
            "wrong type",
            "field 'category' must be text, a whole number or a list of such, the label of the pair in reports; got "
            f"{value!r:.40}. If the column means something else, --data.load.ignore '[category]' leaves it out",
        )
    return ", ".join(filter(None, map(str, labels)))


def _tools(record: Record, value: object) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(record, "wrong tools", "field 'tools' must be a list, or one written as JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError(record, "wrong tools", "field 'tools' must be a list of mappings, one for each function")
    return [without_nulls(tool) for tool in value]


def _template_kwargs(record: Record) -> dict[str, Any]:
    value = record.fields.get("chat_template_kwargs")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise RowError(record, "wrong type", "field 'chat_template_kwargs' must be a mapping of names to values")
    return {str(name): item for name, item in value.items() if item is not None}
