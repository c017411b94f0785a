"""Layouts of preference data published by other projects: ShareGPT's, Orca's, Azure's and KTO's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bdpo_pl.data.messages import parse_message, parse_messages
from bdpo_pl.data.rows import Content, Message, PreferenceRow, RowError, check_row, parse_content, parse_weight
from bdpo_pl.data.schemas.preference import SHARED_COLUMNS, make_pair, parse_response
from bdpo_pl.data.schemas.schema import Schema, SchemaContext, make_row
from bdpo_pl.data.sources import Record
from bdpo_pl.errors import InputError


class ShareGPT(Schema):
    """The schema of a conversation up to the user's last turn, and two answers to it."""

    def recognises(self, first: Record) -> bool:
        """Return true if the conversation is a list of turns and there is no prompt column."""
        return super().recognises(first) and "prompt" not in first.fields and _is_list(first.fields["conversations"])

    def parse(self, record: Record) -> PreferenceRow:
        """Return the preference row in `record`."""
        turns = record.fields.get("conversations")
        if not isinstance(turns, (list, tuple)) or not turns:
            raise RowError(record, "missing conversations", "field 'conversations' must be a list of turns")
        prompt = parse_messages(record, "conversations", turns)
        chosen, rejected = (_answer(parse_response(record, name)) for name in ("chosen", "rejected"))
        return check_row(make_row(record, prompt, chosen, rejected))


class Orca(Schema):
    """The schema of a system message, a question and two answers."""

    def recognises(self, first: Record) -> bool:
        """Return true if there is a question and no prompt column."""
        has_question = "question" in first.fields or "input" in first.fields
        return super().recognises(first) and has_question and "prompt" not in first.fields

    def parse(self, record: Record) -> PreferenceRow:
        """Return the preference row in `record`."""
        name = "question" if "question" in record.fields else "input"
        prompt = parse_content(record, name, record.fields.get(name))
        chosen, rejected = (parse_response(record, side) for side in ("chosen", "rejected"))
        if not isinstance(prompt, str):
            raise RowError(record, "wrong type", f"field '{name}' must be text, got {type(prompt).__name__}")
        if type(chosen) is not type(rejected):
            raise RowError(record, "wrong type", "'chosen' and 'rejected' must both be text or both be messages")
        return check_row(make_row(record, prompt, chosen, rejected))

    def check_unread(self, record: Record, row: object, ignore: Sequence[str]) -> None:
        """Allow no unread column except the question."""
        super().check_unread(record, row, (*ignore, "question" if "question" in record.fields else "input"))


class Azure(Schema):
    """The schema of OpenAI and Azure: `input` with the messages, and two outputs."""

    def recognises(self, first: Record) -> bool:
        """Return true if both outputs are there."""
        return "preferred_output" in first.fields and "non_preferred_output" in first.fields

    def parse(self, record: Record) -> PreferenceRow:
        """Return the preference row in `record`."""
        given = record.fields.get("input")
        given = given if isinstance(given, dict) else {"messages": record.fields.get("input.messages")}
        if not _is_list(given.get("messages")):
            raise RowError(record, "missing input.messages", "field 'input' must hold a list 'messages'")
        prompt = parse_messages(record, "input.messages", given["messages"])
        sides = (_output(record, "preferred_output"), _output(record, "non_preferred_output"))
        return check_row(make_row(record, prompt, sides[0], sides[1], tools=given.get("tools") or None))


_ASKED = ("system", "tools", "chat_template_kwargs")
"""Columns that change what the model is asked, beside the prompt."""


class KTO(Schema):
    """The schema of single answers with a label; answers to one prompt with different labels are paired."""

    def rows(self, records: Iterable[Record], context: SchemaContext) -> Iterable[PreferenceRow]:
        """Return pairs: each good answer to a prompt with a bad one, in order. Tools and the like are a part of it.

        Raises:
            InputError: no prompt has answers with both labels.
        """
        groups: dict[str, tuple[list[Labelled], list[Labelled]]] = {}
        source = ""
        for labelled in self._parsed(records, context, parse_labelled):
            fields = labelled.record.fields
            key = json.dumps(
                [labelled.prompt, *(fields.get(name) or None for name in _ASKED)], sort_keys=True, default=str
            )
            groups.setdefault(key, ([], []))[not labelled.is_good].append(labelled)
            source = labelled.record.source
        if groups and not any(good and bad for good, bad in groups.values()):
            raise InputError(
                f"{source}: single answers with a label (KTO's layout), and no prompt has both a good and a bad one; "
                "preferences need two answers to one prompt: give a set of pairs, or take KTOLoss, which needs none"
            )
        return self._paired(groups, context)

    def _paired(
        self, groups: dict[str, tuple[list[Labelled], list[Labelled]]], context: SchemaContext
    ) -> Iterator[PreferenceRow]:
        for good, bad in groups.values():
            pairs = min(len(good), len(bad))
            for chosen, rejected in zip(good, bad, strict=False):
                context.report.drop("paired with another answer to its prompt", rejected.record.place)
                try:
                    if parse_weight(chosen.record) != parse_weight(rejected.record):
                        raise RowError(
                            chosen.record,
                            "two weights",
                            f"its 'weight' is not that of {rejected.record.place}, the answer with which it is paired; "
                            "give both one weight, or leave the column out with --data.load.ignore '[weight]'",
                        )
                    yield make_pair(chosen.record, chosen.prompt, chosen.answer, rejected.answer)
                except RowError as error:
                    context.refuse(error, chosen.record)
            for left in (*good[pairs:], *bad[pairs:]):
                context.report.drop("no answer of the other label to its prompt", left.record.place)


@dataclass(frozen=True)
class Labelled:
    """A single answer, and whether it is good."""

    record: Record
    prompt: Content
    answer: Content
    is_good: bool


def parse_labelled(record: Record) -> Labelled:
    """Return the labelled answer in `record`.

    Raises:
        RowError: a text is missing, or the label is neither true nor false.
    """
    prompt, answer = (parse_content(record, name, record.fields.get(name)) for name in ("prompt", "completion"))
    label = record.fields.get("label")
    if not isinstance(label, bool):
        raise RowError(record, "wrong type", f"field 'label' must be true or false, got {label!r:.40}")
    return Labelled(record, prompt, answer, label)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value)


def _answer(response: Content) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _output(record: Record, name: str) -> list[Message]:
    value = record.fields.get(name)
    if isinstance(value, dict):
        return [parse_message(record, name, value)]
    if not isinstance(value, (list, tuple)) or not value:
        raise RowError(record, f"missing {name}", f"field '{name}' must be a list of messages")
    return parse_messages(record, name, value)


SHARE_GPT = ShareGPT(
    "sharegpt",
    ("conversations", "chosen", "rejected"),
    SHARED_COLUMNS,
    about="conversations (from, value or role, content), chosen, rejected: LLaMA-Factory's form",
)
ORCA = Orca(
    "orca", ("system", "chosen", "rejected"), SHARED_COLUMNS, about="system, question or input, chosen, rejected"
)
AZURE = Azure(
    "azure",
    ("preferred_output", "non_preferred_output"),
    ("input", "input.messages", *SHARED_COLUMNS),
    about="input with messages (and tools), preferred_output, non_preferred_output",
)
KTO_ = KTO(
    "kto",
    ("prompt", "completion", "label"),
    SHARED_COLUMNS,
    is_messy=True,
    about="prompt, completion, label: single answers, paired where a prompt has both labels",
)
