"""Preference pairs as token ids, and how the rows they come from were read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bdpo_pl.data.control_tokens import Ids


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of one pair. The model reads `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`.

    Attributes:
        prompt_ids: at least one token, begun by the BOS token where the tokenizer or the template puts one.
        chosen_ids: at least one token, ended by the end-of-turn or EOS token unless it was truncated.
        rejected_ids: likewise.
        merged: the tokenizer joined the prompt's end with a response's beginning, so the cut lies before that token.
        chosen_trained: for each token of the chosen response, whether it is trained on; None: all are.
        rejected_trained: likewise.
        header: last tokens of the prompt that open the assistant's turn.
    """

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    merged: bool = False
    chosen_trained: tuple[bool, ...] | None = None
    rejected_trained: tuple[bool, ...] | None = None
    header: int = 0


@dataclass
class ReadAs:
    """How the rows given to a `PairTokenizer` were read: counts for the data report.

    Attributes:
        templated: rows rendered with the chat template.
        dialogues: of these, texts that held a whole dialogue.
        plain: rows read as plain text.
        counts: further counts, by what is counted.
        added: what the template put before answers.
    """

    templated: int = 0
    dialogues: int = 0
    plain: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)

    def add(self, other: ReadAs) -> None:
        """Add what was counted elsewhere."""
        self.templated += other.templated
        self.dialogues += other.dialogues
        self.plain += other.plain
        self.added |= other.added
        for what, number in other.counts.items():
            self.counts[what] = self.counts.get(what, 0) + number

    def count(self, what: str, happened: bool = True) -> None:
        """Count one row if something happened to it."""
        if happened:
            self.counts[what] = self.counts.get(what, 0) + 1


def padding_id(tokenizer: Any) -> int:
    """Return the token id that fills padding, which the model does not see; any will do."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))
