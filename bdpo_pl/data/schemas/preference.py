"""The common preference schema: `chosen`, `rejected` and, unless they contain it, `prompt`.

Optional columns are `system`, `tools`, `chat_template_kwargs`, `category` (a label for reports), `weight` (of its
loss), and `chosen_safe` and `rejected_safe` (true or false).
"""

from __future__ import annotations

from bdpo_pl.data.rows import Content, Message, PreferenceRow, RowError, check_row, parse_content
from bdpo_pl.data.schemas.hh_rlhf import ASSISTANT, is_dialogue, parse_dialogues, prompt_turns
from bdpo_pl.data.schemas.schema import SAFETY_COLUMNS, Schema, make_row, split_conversations
from bdpo_pl.data.sources import Record

SHARED_COLUMNS = ("system", "tools", "chat_template_kwargs", "category", "weight", *SAFETY_COLUMNS)


class Preference(Schema):
    """The schema of texts or messages, with the prompt in its own column or implicit."""

    def parse(self, record: Record) -> PreferenceRow:
        """Return the preference row in `record`.

        Without a `prompt` column, `chosen` and `rejected` are whole conversations, and the prompt is their common
        beginning: messages, or dialogues in HH-RLHF's format. With the column, they may still be whole conversations
        (UltraFeedback's layout); the prompt is then removed from them.

        Raises:
            RowError: a field is missing, empty or of the wrong type, or an implicit prompt cannot be found.
        """
        chosen = parse_response(record, "chosen")
        rejected = parse_response(record, "rejected")
        if type(chosen) is not type(rejected):
            raise RowError(record, "wrong type", "'chosen' and 'rejected' must both be text or both be messages")
        if "prompt" in record.fields:
            prompt = parse_content(record, "prompt", record.fields["prompt"])
            if isinstance(chosen, list) and isinstance(rejected, list) and _is_whole(chosen, rejected):
                prompt, chosen, rejected = _take_out(record, prompt, chosen, rejected)
            elif (
                isinstance(chosen, str) and isinstance(rejected, str) and is_dialogue(chosen) and is_dialogue(rejected)
            ):
                return _checked(parse_dialogues(record, chosen, rejected), prompt)
            return make_pair(record, prompt, chosen, rejected)
        if isinstance(chosen, list) and isinstance(rejected, list):
            return check_row(make_row(record, *split_conversations(record, chosen, rejected)))
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        if is_dialogue(chosen) and is_dialogue(rejected):
            return parse_dialogues(record, chosen, rejected)
        raise RowError(
            record,
            "no prompt",
            "there is no 'prompt', and 'chosen' and 'rejected' are plain texts without HH-RLHF's '\\n\\nHuman:' and "
            f"'\\n\\nAssistant:'; {_prompt_hint(record)}",
        )


PREFERENCE = Preference(
    "preference",
    ("chosen", "rejected"),
    ("prompt", *SHARED_COLUMNS),
    about="prompt (or implicit), chosen, rejected as text or messages: TRL's and UltraFeedback's forms",
)


def make_pair(record: Record, prompt: Content, chosen: Content, rejected: Content) -> PreferenceRow:
    """Return the row of a prompt and two answers; a prompt in HH-RLHF's format, with its final mark, is a dialogue.

    Raises:
        RowError: they cannot be trained on.
    """
    if (
        isinstance(prompt, str)
        and isinstance(chosen, str)
        and isinstance(rejected, str)
        and is_dialogue(prompt)
        and prompt.rstrip().endswith(ASSISTANT)
    ):
        return parse_dialogues(record, prompt + chosen, prompt + rejected)
    return check_row(make_row(record, prompt, chosen, rejected))


def parse_response(record: Record, name: str) -> Content:
    """Return the response in column `name`: text, messages, or a single message.

    Raises:
        RowError: the column contains something else.
    """
    value = record.fields.get(name)
    return parse_content(record, name, [value] if isinstance(value, dict) else value)


def _prompt_hint(record: Record) -> str:
    for column in ("question", "instruction", "query", "input"):
        if isinstance(record.fields.get(column), str):
            return f"read the prompt with --data.load.columns '{{prompt: {column}}}'"
    return f"add a 'prompt' column, or name yours with --data.load.columns '{{prompt: your_column}}' {_found(record)}"


def _found(record: Record) -> str:
    return f"(found {', '.join(map(repr, record.fields))})"


def _is_whole(chosen: list[Message], rejected: list[Message]) -> bool:
    return all(turns and turns[0]["role"] != "assistant" for turns in (chosen, rejected))


def _take_out(
    record: Record, prompt: Content, chosen: list[Message], rejected: list[Message]
) -> tuple[Content, Content, Content]:
    """Return the common prompt of two whole conversations and the rest of each, if the `prompt` column agrees."""
    turns, chosen, rejected = split_conversations(record, chosen, rejected)
    return _agreed(record, prompt, turns), chosen, rejected


def _checked(row: PreferenceRow, prompt: Content) -> PreferenceRow:
    """Return the row of two whole dialogues as text, if the `prompt` column says no more and no less than they do."""
    assert row.turns is not None
    turns = [m for m in row.turns.prompt if m["role"] != "system"]
    given = prompt_turns(prompt) if isinstance(prompt, str) else None
    if _agreed(row.record, prompt if given is None else given, turns) != turns:
        raise _two_prompts(row.record)
    return row


def _agreed(record: Record, prompt: Content, turns: list[Message]) -> Content:
    """Return the prompt of whole conversations, with the system message of either, if the `prompt` column agrees."""
    if isinstance(prompt, str):
        if any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in turns):
            return turns
    else:
        said = [m for m in turns if m["role"] != "system"]
        if prompt[-len(turns) :] == turns or [m for m in prompt if m["role"] != "system"] == said:
            # Whichever has a system message.
            return prompt if len(prompt) >= len(turns) else turns
    raise _two_prompts(record)


def _two_prompts(record: Record) -> RowError:
    return RowError(
        record,
        "two prompts",
        "'chosen' and 'rejected' are whole conversations, and the prompt in them is not the one in 'prompt'; leave the "
        "column out with --data.load.ignore '[prompt]', or correct the row",
    )
