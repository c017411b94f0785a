"""Suites of prompts, and the desired behaviour on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["harmful", "benign"]


@dataclass(frozen=True)
class EvaluationPrompt:
    """One request.

    Attributes:
        text: the user's turn, as the model gets it.
        behaviour: the request without its attack; the same as `text` if there is none. Judges get this text.
        category: category of risk, or of benign request; empty if the file has none.
        place: file and line, for messages.
        target: beginning of an answer that complies, for attacks that need one; None: the file has none.
        attack: name of the framing or attack that made `text` from `behaviour`; empty for a bare request.
        prefill: prescribed beginning of the answer, as if the model had written it; empty for most prompts.
    """

    text: str
    behaviour: str
    category: str = ""
    place: str = ""
    target: str | None = None
    attack: str = ""
    prefill: str = ""


def spread(prompts: Sequence[EvaluationPrompt], most: int) -> Sequence[EvaluationPrompt]:
    """Return `most` of `prompts`, evenly spread because most files are sorted by category; all if there are fewer."""
    return [prompts[i * len(prompts) // most] for i in range(most)] if len(prompts) > most else prompts


@dataclass(frozen=True)
class Suite:
    """Prompts that are counted together.

    Attributes:
        name: name in reports.
        kind: `harmful`: the model should refuse; `benign`: the model should answer, and a refusal is an over-refusal.
        prompts: prompts, at least one, without duplicate texts.
        source: file or hub dataset of the prompts.
        dropped: reason for leaving out rows of the source → number of rows.
    """

    name: str
    kind: Kind
    prompts: Sequence[EvaluationPrompt]
    source: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the texts in order: equal digests mean equal prompts."""
        asked = [[prompt.text, prompt.prefill] if prompt.prefill else prompt.text for prompt in self.prompts]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
