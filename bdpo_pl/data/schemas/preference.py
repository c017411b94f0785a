"""The common preference schema: `chosen`, `rejected` and, unless it is implicit in them, `prompt`.

Optional are `category`, a label for reports, and `chosen_safe` and `rejected_safe`, true or false.
"""

from __future__ import annotations

from bdpo_pl.data.rows import (
    Content,
    Message,
    PreferenceRow,
    RowError,
    check_row,
    common_prefix_length,
    parse_content,
    parse_flag,
)
from bdpo_pl.data.sources import Record

REQUIRED_COLUMNS = ("chosen", "rejected")
SAFETY_COLUMNS = ("chosen_safe", "rejected_safe")
"""Optional: true or false."""

_ASSISTANT_MARK = "\n\nAssistant:"
"""What precedes every response in Anthropic's HH-RLHF, the best known set with implicit prompts."""


def parse_preference(record: Record) -> PreferenceRow:
    """The preference row in `record`.

    Text or messages are both taken, with the prompt in a column of its own or implicit: then chosen and rejected are
    whole conversations, and the prompt is what they begin with in common.

    Raises:
        RowError: a field is missing, empty or of the wrong type, or an implicit prompt cannot be found.
    """
    chosen = parse_content(record, "chosen", record.fields.get("chosen"))
    rejected = parse_content(record, "rejected", record.fields.get("rejected"))
    if type(chosen) is not type(rejected):
        raise RowError(record, "wrong type", "'chosen' and 'rejected' must both be text or both be messages")
    category = record.fields.get("category")
    label = category if isinstance(category, str) else ""
    safe = [parse_flag(record, name) for name in SAFETY_COLUMNS]
    if "prompt" in record.fields:
        prompt = parse_content(record, "prompt", record.fields["prompt"])
        return check_row(PreferenceRow(prompt, chosen, rejected, record, False, label, *safe))
    if chosen == rejected:
        return check_row(PreferenceRow("implicit", chosen, rejected, record))
    prompt, chosen, rejected = _split_implicit(record, chosen, rejected)
    return check_row(PreferenceRow(prompt, chosen, rejected, record, isinstance(prompt, str), label, *safe))


def _split_implicit(record: Record, chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _text_cut(chosen, rejected)
        parts: tuple[Content, Content, Content] = (chosen[:cut], chosen[cut:], rejected[cut:])
    else:
        assert isinstance(chosen, list)
        assert isinstance(rejected, list)
        cut = _message_cut(chosen, rejected)
        parts = (chosen[:cut], chosen[cut:], rejected[cut:])
    if not parts[0]:
        raise RowError(
            record,
            "no prompt",
            "there is no 'prompt', and 'chosen' and 'rejected' begin with nothing in common; add a 'prompt' column",
        )
    return parts


def _text_cut(chosen: str, rejected: str) -> int:
    common = chosen[: common_prefix_length(chosen, rejected)]
    mark = common.rfind(_ASSISTANT_MARK)
    if mark >= 0:
        return mark + len(_ASSISTANT_MARK)
    # Both responses may begin with the same words; without a mark, only keep from splitting a word.
    cut = len(common)
    while cut > 0 and not common[cut - 1].isspace():
        cut -= 1
    # The blank before a response belongs to it: tokenizers join it to the word that follows.
    return cut - 1 if cut > 0 and common[cut - 1] == " " else cut


def _message_cut(chosen: list[Message], rejected: list[Message]) -> int:
    cut = common_prefix_length(chosen, rejected)
    # A turn of the assistant that both share is still followed by the user's; otherwise it is where they part.
    while cut > 0 and chosen[cut - 1]["role"] == "assistant":
        cut -= 1
    return cut
