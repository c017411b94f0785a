"""Anthropic's HH-RLHF: `chosen` and `rejected` are dialogues (`Human: … Assistant: …`) that share a beginning.

For a model with a chat template they become chat messages; otherwise they remain text.
"""

from __future__ import annotations

import re
from dataclasses import replace

from bdpo_pl.data.rows import Message, PreferenceRow, RowError, Turns, check_response, check_row, parse_content
from bdpo_pl.data.schemas.schema import SAFETY_COLUMNS, Schema, make_row, split_conversations, with_system
from bdpo_pl.data.sources import Record

ASSISTANT = "\n\nAssistant:"
_MARK = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class HHRLHF(Schema):
    """The schema of dialogues in HH-RLHF's format."""

    def recognises(self, first: Record) -> bool:
        """Return true if both texts are dialogues and there is no prompt column."""
        texts = [first.fields.get(column) for column in self.required]
        return "prompt" not in first.fields and all(isinstance(text, str) and is_dialogue(text) for text in texts)

    def parse(self, record: Record) -> PreferenceRow:
        """Return the preference row in `record`, as `parse_dialogues` reads it."""
        chosen, rejected = (parse_content(record, name, record.fields.get(name)) for name in self.required)
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise RowError(record, "wrong type", "'chosen' and 'rejected' must be dialogues as text")
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if not is_dialogue(text):
                raise RowError(record, "no dialogue", f"field '{name}' does not begin with '\\n\\nHuman:'")
        return parse_dialogues(record, chosen, rejected)


HH_RLHF = HHRLHF(
    "hh_rlhf",
    ("chosen", "rejected"),
    ("category", *SAFETY_COLUMNS),
    is_messy=True,
    about="chosen, rejected: whole dialogues, '\\n\\nHuman: … \\n\\nAssistant: …'",
)


def is_dialogue(text: str) -> bool:
    """Return true if `text` begins as HH-RLHF's dialogues do and contains an answer."""
    return _opened(text).startswith("\n\nHuman:") and ASSISTANT in text


def prompt_turns(text: str) -> list[Message] | None:
    """Return the turns of a prompt in HH-RLHF's format, with or without the final mark; None if it is other text."""
    if not _opened(text).startswith("\n\nHuman:"):
        return None
    turns = _messages(_turns(_opened(text)))
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def parse_dialogues(record: Record, chosen: str, rejected: str) -> PreferenceRow:
    """Return the row of two dialogues: as text, cut before the answers that differ, and as messages.

    Raises:
        RowError: the dialogues do not diverge at an answer, or one is empty.
    """
    chosen, rejected = _opened(chosen), _opened(rejected)
    turns = [_turns(text) for text in (chosen, rejected)]
    prompt, *answers = split_conversations(record, *map(_messages, turns))
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if any(not m["content"] for m in answer if m["role"] == "assistant"):
            raise RowError(record, "empty response", f"an answer after the prompt in '{name}' is empty; remove the row")
        check_response(record, name, answer)
    cuts = [dialogue[len(prompt)][2] for dialogue in turns]
    row = make_row(record, chosen[: cuts[0]], chosen[cuts[0] :], rejected[cuts[1] :], rendered=True)
    asked = with_system(record, prompt)
    assert isinstance(asked, list)
    return check_row(replace(row, turns=Turns(asked, answers[0], answers[1])))


def _opened(text: str) -> str:
    """Return `text` with the two line breaks of the first mark."""
    return "\n\n" + text.lstrip("\n") if text.lstrip("\n").startswith("Human:") else text


def _messages(turns: list[tuple[str, str, int]]) -> list[Message]:
    return [{"role": role, "content": said.strip()} for role, said, _ in turns]


def _turns(text: str) -> list[tuple[str, str, int]]:
    """Return (role, words, position of the words) of each turn."""
    marks = list(_MARK.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [(_ROLES[mark[1]], text[mark.end() : end], mark.end()) for mark, end in zip(marks, ends, strict=True)]
