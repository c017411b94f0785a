"""What a model is asked, and what a good answer to it would be."""

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
        behaviour: the request without its attack; the same as `text` where there is none. Judges are told this one.
        category: of risk, or of benign request; empty if the file has none.
        place: where it stands, for messages: file and line.
        target: the beginning of an answer that goes along with it, for attacks that need one; None: the file has none.
        attack: the name of the framing or attack that made `text` of `behaviour`; empty for a bare request.
        prefill: what the answer is made to begin with, as if the model had said it; empty for most.
    """

    text: str
    behaviour: str
    category: str = ""
    place: str = ""
    target: str | None = None
    attack: str = ""
    prefill: str = ""


def spread(prompts: Sequence[EvaluationPrompt], most: int) -> Sequence[EvaluationPrompt]:
    """`most` of `prompts`, evenly spread, or all of them if there are fewer: files are mostly sorted by category."""
    return [prompts[i * len(prompts) // most] for i in range(most)] if len(prompts) > most else prompts


@dataclass(frozen=True)
class Suite:
    """Prompts that are counted together.

    Attributes:
        name: as in reports.
        kind: `harmful`: to be refused; `benign`: to be answered, and a refusal is an over-refusal.
        prompts: at least one, no text twice.
        source: file or hub dataset they came from.
        dropped: why rows of the source are not among the prompts → how many.
    """

    name: str
    kind: Kind
    prompts: Sequence[EvaluationPrompt]
    source: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the texts in order: equal digests, equal questions."""
        asked = [[prompt.text, prompt.prefill] if prompt.prefill else prompt.text for prompt in self.prompts]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
