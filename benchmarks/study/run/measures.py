"""Measures of held-out and training pairs at the end of a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def pair_measures(
    values: Mapping[str, float] | Mapping[str, str], accuracy: str, names: Sequence[str] = ()
) -> dict[str, float]:
    """Return measures of pairs in nats without β, comparable between losses, and their gaps.

    Args:
        values: results of an evaluation of `PreferenceModule`, or a row of its log, of held-out and of training pairs.
        accuracy: name of the share of pairs that are ranked right: `accuracy` by the loss's reward, `logp_accuracy` by
            log-probability per token.
        names: names of further measures, which losses that do not have them leave out.

    Returns:
        The measures of both sets, with `margin`, the drift of the chosen response minus that of the rejected one; and
        the gap between training and held-out pairs of `margin` and of `accuracy`.
    """
    found = {}
    for split in ("held_out", "train_probe"):
        further = [name for name in names if values.get(f"{split}/{name}") not in (None, "")]
        for name in (accuracy, "drift_chosen", "drift_rejected", "logp_chosen", "logp_rejected", *further):
            found[f"{split}/{name}"] = float(values[f"{split}/{name}"])
        found[f"{split}/margin"] = found[f"{split}/drift_chosen"] - found[f"{split}/drift_rejected"]
    for name in ("margin", accuracy):
        found[f"gap/{name}"] = found[f"train_probe/{name}"] - found[f"held_out/{name}"]
    return found
