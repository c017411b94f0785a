"""The words of a run's results where it trains on single answers with a label, in place of those for pairs."""

from __future__ import annotations

INSTEAD = {
    "held-out preference accuracy": "held-out answers on their label's side",
    "preference accuracy": "answers on their label's side",
    "drift of the chosen, nats": "drift of the answers, nats",
    "drift of the rejected, nats": "drift of mismatched answers, nats",
    "mean loss of a pair": "mean loss of an answer",
    "training pairs": "training answers",
    "held-out pairs": "held-out answers",
    "implicit reward, chosen − rejected": "implicit reward on the label's side",
    "Preference accuracy": "Answers on their label's side",
    "share of pairs": "share of answers",
    "held-out chosen": "held-out answers",
    "held-out rejected": "mismatched answers",
    "A falling line of the chosen responses shows that they are unlearnt along with the rejected ones.": (
        "Answers, good and bad together, and mismatched ones, which are another prompt's: KTO measures an answer "
        "against their drift."
    ),
    "Before training the policy equals its reference, so accuracy is ½ by definition. The accuracy by "
    "log-probability per token needs no reference; before training it is the base model's.": (
        "Before training the policy equals its reference, so the share is ½ by definition."
    ),
}
"""Words for pairs, and those for answers."""


def worded(text: str, single: bool) -> str:
    """Return `text`, or for single answers what is said in its place."""
    return INSTEAD.get(text, text) if single else text
