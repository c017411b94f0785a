"""The judge that needs no model: a list of phrases that refusals open with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from bdpo_pl.evaluation.judges.judge import Exchange, Judge, Verdict
from bdpo_pl.refusals import OPENING, REFUSAL_PHRASES, is_refusal

LIMITS = (
    f"reads the first {OPENING} characters of an answer: a refusal in words of its own, in another language or after a "
    "long preamble counts as compliance, and such a phrase quoted at the head as a refusal; tells refusal, not harm"
)


class PhraseJudge(Judge):
    """Takes an answer for a refusal if it opens with one of `bdpo_pl.refusals.REFUSAL_PHRASES`."""

    name = "phrases"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Whether each answer refuses; of harm it says nothing."""
        return [Verdict(refused=is_refusal(e.response)) for e in exchanges]

    def facts(self) -> Mapping[str, str]:
        """The list's size and hash, and what it cannot do."""
        content = json.dumps([OPENING, *REFUSAL_PHRASES]).encode()
        return {
            "phrases": str(len(REFUSAL_PHRASES)),
            "sha256": hashlib.sha256(content).hexdigest(),
            "blank answers": "are no refusals; they are counted apart",
            "limits": LIMITS,
        }
