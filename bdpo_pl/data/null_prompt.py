"""The null prompts x₀ of a source, against which the comprehension of its pairs is measured.

A row's own variables of the chat template (`chat_template_kwargs`) may change what follows the user's turn, as
`enable_thinking: false` does. Its null prompt must then end like its prompt: otherwise the first token of a response
would carry the cost of what the null prompt lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdpo_pl.data.chat_template import Conversation
from bdpo_pl.data.control_tokens import Ids
from bdpo_pl.data.rows import PreferenceRow
from bdpo_pl.data.tokenization import PairTokenizer


@dataclass
class _Alike:
    """Rows with the same text after the user's turn: the variables of the first, and those that all of them have."""

    first: Mapping[str, Any]
    shared: Mapping[str, Any]


class NullPrompts:
    """The null prompts of a source's rows: one for all rows with the same text after the user's turn.

    It is rendered with the variables that these rows have in common.

    Args:
        tokenizer: tokenizer of pairs, which reads the rows.
    """

    def __init__(self, tokenizer: PairTokenizer) -> None:
        self._tokenizer = tokenizer
        self._groups: dict[str | None, _Alike] = {}
        self._of_rows: list[str | None] = []
        self._as_text = False

    def add(self, row: PreferenceRow) -> None:
        """Add the next row."""
        self._as_text = self._tokenizer.reads_as_text(row)
        variables = {} if self._as_text else row.template_kwargs
        after = None if self._as_text else self._after_user(variables)
        group = self._groups.setdefault(after, _Alike(variables, variables))
        if group.shared != variables:
            group.shared = {
                name: value for name, value in group.shared.items() if name in variables and variables[name] == value
            }
        self._of_rows.append(after)

    def of_rows(self) -> list[Ids]:
        """Return the token ids of each row's null prompt."""
        found: dict[str | None, Ids] = {}
        for after, group in self._groups.items():
            alike = self._as_text or self._after_user(group.shared) == after
            found[after] = self._tokenizer.null_prompt_ids(self._as_text, group.shared if alike else group.first)
        return [found[after] for after in self._of_rows]

    def _after_user(self, variables: Mapping[str, Any]) -> str | None:
        facts = self._tokenizer.encoder.template.facts(Conversation([], None, variables))
        return None if facts is None else facts.after_user
