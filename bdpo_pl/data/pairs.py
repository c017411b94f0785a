"""Preference pairs as token ids, and counts of how their rows were read."""

from __future__ import annotations

from dataclasses import dataclass, field

from bdpo_pl.data.control_tokens import Ids
from bdpo_pl.data.tokenizer_like import TokenizerLike


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of one pair. The model reads `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`.

    Attributes:
        prompt_ids: token ids of the prompt, at least one; begins with BOS if the tokenizer or the template adds it.
        chosen_ids: token ids of the chosen response, at least one; ends with end-of-turn or EOS unless truncated.
        rejected_ids: token ids of the rejected response, likewise.
        merged: true if the tokenizer joined the prompt's end with a response's beginning; the cut is then before that
            token.
        chosen_trained: flag for each token of the chosen response, true if it is trained on; None: all are.
        rejected_trained: flags of the rejected response, likewise.
        header: number of final prompt tokens that open the assistant's turn; None if they were not found.
    """

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    merged: bool = False
    chosen_trained: tuple[bool, ...] | None = None
    rejected_trained: tuple[bool, ...] | None = None
    header: int | None = 0


@dataclass
class ReadAs:
    """Counts of how a `PairTokenizer` read its rows, for the data report.

    Attributes:
        templated: number of rows rendered with the chat template.
        dialogues: number of these whose texts contained a whole dialogue.
        plain: number of rows read as plain text.
        counts: further counts, by name.
        added: texts that the template put before answers.
    """

    templated: int = 0
    dialogues: int = 0
    plain: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)

    def add(self, other: ReadAs) -> None:
        """Add the counts of another process."""
        self.templated += other.templated
        self.dialogues += other.dialogues
        self.plain += other.plain
        self.added |= other.added
        for what, number in other.counts.items():
            self.counts[what] = self.counts.get(what, 0) + number

    def count(self, what: str, happened: bool = True) -> None:
        """Count one row if `happened`."""
        if happened:
            self.counts[what] = self.counts.get(what, 0) + 1


def padding_id(tokenizer: TokenizerLike) -> int:
    """Return the token id that fills padding. The model does not see it, so any id will do."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))
