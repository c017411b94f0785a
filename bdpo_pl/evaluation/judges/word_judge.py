"""Judges whose model answers with one of a few words, each with a score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from bdpo_pl.evaluation.chat.chat_model import Message
from bdpo_pl.evaluation.judges.judge import Exchange, Verdict
from bdpo_pl.evaluation.judges.model_judge import BLANK, ScoringJudge


@runtime_checkable
class Weighing(Protocol):
    """A model that returns the probabilities of words as the beginning of its answer."""

    def shares(self, conversations: Sequence[Sequence[Message]], words: Sequence[str]) -> list[list[float]]:
        """Return, for each conversation, the probabilities of `words` as the first token; they sum to 1."""
        ...


class WordJudge(ScoringJudge):
    """A judge whose score is the mean of the words' scores, weighted by their probabilities.

    If a model does not give probabilities, for example behind an endpoint, the word that it answers counts.

    Attributes:
        words: score of each word.
    """

    words: Mapping[str, float]
    new_tokens = 32

    def meaning(self) -> Mapping[str, str]:
        """Return the words, and whether their probabilities or the model's choice among them counts."""
        by = "the probabilities of" if isinstance(self.model, Weighing) else "the model's choice among"
        return {"score": f"by {by} {', '.join(self.words)}"}

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return a verdict on each exchange, in order; the model is not queried about blank answers.

        Raises:
            InputError: the model cannot be used, or its answer does not have the required form after all attempts.
        """
        if not isinstance(self.model, Weighing):
            return super().judge(exchanges)
        asked = [i for i, exchange in enumerate(exchanges) if exchange.response.strip()]
        self._notes["blank answers"] += len(exchanges) - len(asked)
        verdicts = [BLANK] * len(exchanges)
        shares = self.model.shares([self.conversation(exchanges[i]) for i in asked], list(self.words))
        for i, share in zip(asked, shares, strict=True):
            verdicts[i] = self._verdict(sum(p * score for p, score in zip(share, self.words.values(), strict=True)))
        return verdicts

    def parse(self, answer: str) -> Verdict | None:
        """Parse the word that the answer begins with."""
        known = {word.lower(): score for word, score in self.words.items()}
        first = re.match(r"\W*(\w+)", answer)
        score = None if first is None else known.get(first[1].lower())
        return None if score is None else self._verdict(score)

    def _verdict(self, score: float) -> Verdict:
        return Verdict(unsafe=score >= self.unsafe_from, score=score)
