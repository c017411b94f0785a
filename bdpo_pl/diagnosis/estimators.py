"""The estimators of comprehension, in words for reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """What an estimator measures.

    Attributes:
        unit: unit of its values, "" if they have none.
        axis: label of an axis with its values.
        sentence: explanation; `{answer}` is what is comprehended.
    """

    unit: str
    axis: str
    sentence: str

    def label(self) -> str:
        """Return the label of an axis, with the unit."""
        return f"{self.axis}, {self.unit}" if self.unit else self.axis

    def explained(self, answer: str) -> str:
        """Return the explanation, in which what is comprehended is called `answer`."""
        return self.sentence.replace("{answer}", answer)


_INFORMATION = (
    "Comprehension is the mutual information of prompt and {answer} under the reference model: how much better "
    "it predicts the {answer} when it has seen the prompt than when it has seen the null prompt. It can be negative."
)
MEANINGS: Mapping[str, Meaning] = {
    "pmi": Meaning("nats per token", "mutual information with the prompt", _INFORMATION),
    "pmi_sum": Meaning("nats", "mutual information with the prompt", _INFORMATION),
    "ifd": Meaning(
        "",
        "ratio of losses, null prompt over prompt",
        "Comprehension is the reference model's mean loss on the {answer} after the null prompt, divided by that after "
        "the prompt. Above 1 the prompt helps to predict the {answer}. It is never negative.",
    ),
    "hsic": Meaning(
        "",
        "dependence of hidden states (HSIC)",
        "Comprehension is the dependence of the reference model's hidden states of the prompt and of the {answer} "
        "(normalised HSIC), between 0 and 1.",
    ),
}
"""Meaning of each estimator, by name."""
