"""What is logged of every batch of pairs, on training and on held-out pairs alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from bdpo_pl.losses import PairScores, PreferenceLoss
from bdpo_pl.losses.base import TIE

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
"""In the order of checkpoints: a new name goes to the end."""


def pair_metrics(loss: PreferenceLoss, policy: Tensor, scores: PairScores, losses: Tensor) -> dict[str, Tensor]:
    """Compute the values of `NAMES` for each pair, those that the loss and the data allow; (B,) each, detached.

    - reward_*: implicit reward by the loss: β·log(π_θ/π_ref), or for a loss that reads no reference what it compares
      instead (`PreferenceLoss.rewards`); margin: chosen − rejected; accuracy: margin > 0, a tie counting ½ (rewards
      within β·1e-3, which is rounding, tie).
    - logp_*: log π_θ(y|x); drift_*: log π_θ(y|x) − log π_ref(y|x), where there are reference scores. A falling
      drift_chosen is the sign of a policy that learns to avoid the rejected response at the cost of the chosen one.
    - logp_accuracy: log π_θ(y|x)/|y| of the chosen above that of the rejected, a tie counting ½: what a model
      prefers by itself, with no reference; before training the base model's.
    - weight_*: balance weights; imbalance: |w_w − w_l|. comprehension_*: by the loss's estimator.

    Args:
        loss: the loss.
        policy: (2, B) log π_θ of the chosen and of the rejected responses.
        scores: what is known of the pairs.
        losses: (B,) the loss of each pair.
    """
    per_token = scores.mean_logps(policy[0], policy[1])
    values = {
        "loss": losses,
        "logp_chosen": policy[0],
        "logp_rejected": policy[1],
        "logp_accuracy": 0.5 * (1.0 + (per_token[0] - per_token[1]).sign()),
    }
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
    """Means over pairs of everything in `NAMES`, in vectors, so that ranks synchronise all of them at once.

    Attributes:
        errors: standard errors of the means that `compute` last gave, of values seen at least twice.
    """

    full_state_update = False

    sums: Tensor
    counts: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, float] = {}
        self.add_state("squares", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: dict[str, Tensor], counted: Tensor) -> None:
        """Add the (B,) `values` of the pairs where `counted` (B,) is true."""
        number = counted.sum()
        for i, name in enumerate(NAMES):
            if name in values:
                self.sums[i] += torch.where(counted, values[name], 0.0).sum(dtype=self.sums.dtype)
                self.squares[i] += torch.where(counted, values[name].double().square(), 0.0).sum()
                self.counts[i] += number

    def joined(self, reduce: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The sums and counts of all ranks, by a strategy's `reduce`; all ranks call it."""
        return {
            name: reduce(value.clone(), reduce_op="sum").cpu()
            for name, value in (("sums", self.sums), ("counts", self.counts))
        }

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Go on from what `joined` gave; on one rank alone."""
        # An earlier version had fewer names, those at the beginning.
        known = len(state["sums"])
        self.sums[:known].copy_(state["sums"])
        self.counts[:known].copy_(state["counts"])
        self._update_count = 1

    def compute(self) -> dict[str, float]:
        """Mean of each value that has been seen."""
        sums, counts, squares = self.sums.tolist(), self.counts.tolist(), self.squares.tolist()
        seen = [(i, name) for i, name in enumerate(NAMES) if counts[i]]
        self.errors = {
            # Rounding may leave less than nothing of a variance of nothing.
            name: math.sqrt(max(0.0, squares[i] - sums[i] ** 2 / counts[i]) / (counts[i] - 1) / counts[i])
            for i, name in seen
            if counts[i] > 1
        }
        return {name: sums[i] / counts[i] for i, name in seen}


def gaps(values: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, tuple[float, float | None]]:
    """Compute how far training pairs are ahead of held-out ones: overfitting as a curve.

    Args:
        values: means by `split/name`, of an evaluation.
        errors: their standard errors, as far as they are known.

    Returns:
        The gap and its standard error, None where that is not known, of `gap/margin` and of `gap/accuracy`.
    """
    found: dict[str, tuple[float, float | None]] = {}
    for name in ("margin", "accuracy"):
        probe, held_out = f"train_probe/{name}", f"held_out/{name}"
        if probe in values and held_out in values:
            known = probe in errors and held_out in errors
            error = math.hypot(errors[probe], errors[held_out]) if known else None
            found[f"gap/{name}"] = (values[probe] - values[held_out], error)
    return found


class Throughput:
    """A clock of the tokens that training reads, which stops for validations."""

    def __init__(self) -> None:
        self._tokens = 0
        self._start = 0.0
        self._paused = 0.0

    def start(self) -> None:
        """Begin a window."""
        self._start, self._tokens = time.perf_counter(), 0

    def add(self, tokens: int) -> None:
        """Count `tokens` of this process."""
        self._tokens += tokens

    def pause(self) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Let the clock go on."""
        self._start += time.perf_counter() - self._paused

    def per_second(self) -> float:
        """Give the tokens a second of the window that ends now, and begin the next."""
        rate = self._tokens / (time.perf_counter() - self._start)
        self.start()
        return rate
