"""A judge without a model: lists of phrases that begin refusals, by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bdpo_pl.evaluation.judges.judge import Exchange, Judge, Verdict
from bdpo_pl.refusals import KINDS, OPENING, is_refusal, rules_sha256

LIMITS = (
    f"reads the first {OPENING} characters of an answer: a refusal in words of its own or after a long preamble counts "
    "as compliance; of languages other than English it knows a few usual phrases; tells refusal, not harm"
)


class PhraseJudge(Judge):
    """A judge that recognises an answer that opens with one of `bdpo_pl.refusals.KINDS` and does not then comply."""

    name = "phrases"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge whether each answer refuses; harm is not judged."""
        return [Verdict(refused=is_refusal(e.response)) for e in exchanges]

    def facts(self) -> Mapping[str, str]:
        """Return the lists' size, the hash of all rules, and their limits."""
        return {
            "phrases": f"{sum(map(len, KINDS.values()))} of {len(KINDS)} kinds",
            "sha256": rules_sha256(),
            "blank answers": "are no refusals; they are counted apart",
            "limits": LIMITS,
        }
