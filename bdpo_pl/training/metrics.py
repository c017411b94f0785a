"""The metrics of a batch of pairs, the same for training and held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from bdpo_pl.losses import PairScores, PreferenceLoss
from bdpo_pl.losses.base import TIE
from bdpo_pl.statistics import Interval, gap, normal, wilson

NAMES = (
    "loss",
    "reward_chosen",
    "reward_rejected",
    "margin",
    "accuracy",
    "logp_chosen",
    "logp_rejected",
    "drift_chosen",
    "drift_rejected",
    "weight_chosen",
    "weight_rejected",
    "imbalance",
    "comprehension_chosen",
    "comprehension_rejected",
    "logp_accuracy",
)
"""Names of the metrics, in the order of checkpoints: a new name must be appended."""
SHARES = ("accuracy", "logp_accuracy")
"""Those that are shares of pairs."""


def pair_metrics(loss: PreferenceLoss, policy: Tensor, scores: PairScores, losses: Tensor) -> dict[str, Tensor]:
    """Compute the metrics `NAMES` of each pair that loss and data determine; (B,) each, detached.

    - reward_*: implicit reward of the loss: β·log(π_θ/π_ref), or for a loss without reference the quantity that it
      compares (`PreferenceLoss.rewards`); margin: chosen − rejected; accuracy: 1 if margin > 0, ½ for a tie (rewards
      within β·1e-3, a difference that rounding explains).
    - logp_*: log π_θ(y|x); drift_*: log π_θ(y|x) − log π_ref(y|x), if there are reference scores. A falling
      drift_chosen shows that the policy unlearns the chosen response along with the rejected one.
    - logp_accuracy: 1 if log π_θ(y|x)/|y| of the chosen is above that of the rejected, ½ for a tie. It is the model's
      own preference, without a reference; before training, the base model's. Not of single answers, beside which
      stands an answer to another prompt.
    - weight_*: balance weights; imbalance: |w_w − w_l|. comprehension_*: by the loss's estimator.

    Args:
        loss: the loss.
        policy: (2, B) log π_θ of the chosen and of the rejected responses.
        scores: known scores and lengths of the pairs.
        losses: (B,) loss of each pair.
    """
    values = {"loss": losses, "logp_chosen": policy[0], "logp_rejected": policy[1]}
    if scores.desirable is None:
        per_token = scores.mean_logps(policy[0], policy[1])
        values["logp_accuracy"] = 0.5 * (1.0 + (per_token[0] - per_token[1]).sign())
    if (rewards := loss.rewards(policy[0], policy[1], scores)) is not None:
        chosen, rejected = rewards
        margin = chosen - rejected
        ordered = margin.sign() * (margin.abs() > loss.beta * TIE)
        values |= {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "margin": margin,
            "accuracy": 0.5 * (1.0 + ordered),
        }
    if scores.reference_chosen is not None:
        values["drift_chosen"], values["drift_rejected"] = scores.log_ratios(policy[0], policy[1])
    if (weights := loss.weights(scores)) is not None:
        values |= {
            "weight_chosen": weights.chosen,
            "weight_rejected": weights.rejected,
            "imbalance": (weights.chosen - weights.rejected).abs(),
        }
    if scores.comprehension_chosen is not None and scores.comprehension_rejected is not None:
        values |= {
            "comprehension_chosen": scores.comprehension_chosen,
            "comprehension_rejected": scores.comprehension_rejected,
        }
    return {name: value.detach().float() for name, value in values.items()}


class PairMeans(Metric):
    """Means of all `NAMES` over pairs, in vectors, so that ranks synchronise all of them at once.

    Attributes:
        intervals: 95 % intervals of the means that `compute` returned last: Wilson's for shares of pairs, a normal one
            for other metrics of at least two pairs.
    """

    full_state_update = False

    sums: Tensor
    counts: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.intervals: dict[str, Interval] = {}
        self.add_state("squares", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: dict[str, Tensor], counted: Tensor) -> None:
        """Add the (B,) `values` of the pairs for which `counted` (B,) is true."""
        absent = torch.zeros_like(next(iter(values.values())))
        number = counted.sum()
        none = torch.zeros_like(number)
        rows = torch.where(counted, torch.stack([values.get(name, absent) for name in NAMES]), 0.0)
        # Each row is summed alone: a sum over one axis of all of them may differ in its last digits.
        self.sums += torch.stack([row.sum(dtype=self.sums.dtype) for row in rows])
        self.squares += torch.stack([row.sum() for row in rows.double().square()])
        self.counts += torch.stack([number if name in values else none for name in NAMES])

    def joined(self, reduce: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Return sums and counts over all ranks, by a strategy's `reduce`; all ranks call this method."""
        return {
            name: reduce(value.clone(), reduce_op="sum").cpu()
            for name, value in (("sums", self.sums), ("counts", self.counts))
        }

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Continue from the result of `joined`, on one rank only."""
        # Checkpoints of earlier versions have only the first of the names.
        known = len(state["sums"])
        self.sums[:known].copy_(state["sums"])
        self.counts[:known].copy_(state["counts"])
        self._update_count = 1

    def compute(self) -> dict[str, float]:
        """Compute the mean of each metric that has values."""
        sums, counts, squares = self.sums.tolist(), self.counts.tolist(), self.squares.tolist()
        seen = [(i, name) for i, name in enumerate(NAMES) if counts[i]]
        self.intervals = {}
        for i, name in seen:
            mean, count = sums[i] / counts[i], int(counts[i])
            if name in SHARES:
                self.intervals[name] = Interval(mean, *wilson(sums[i], count), count, count)
            elif count > 1:
                # Rounding can make a variance of zero slightly negative.
                variance = max(0.0, squares[i] - sums[i] ** 2 / count) / (count - 1)
                self.intervals[name] = normal(mean, math.sqrt(variance / count), count)
        return {name: sums[i] / counts[i] for i, name in seen}


def gaps(values: Mapping[str, float], intervals: Mapping[str, Interval]) -> dict[str, Interval]:
    """Compute the gaps between training and held-out pairs, which measure overfitting.

    Args:
        values: means of an evaluation, by `split/name`.
        intervals: intervals of these means, as far as they are known.

    Returns:
        `gap/margin` and `gap/accuracy`, each with its interval; without one if that of a split is not known.
    """
    found: dict[str, Interval] = {}
    for name in ("margin", "accuracy"):
        splits = f"train_probe/{name}", f"held_out/{name}"
        if all(split in values for split in splits):
            probe, held_out = (
                intervals.get(split, Interval(values[split], math.nan, math.nan, 0, 0)) for split in splits
            )
            found[f"gap/{name}"] = gap(probe, held_out)
    return found
