"""Losses built from other losses: a weighted sum, balance weights on any loss of two log-ratios, and WPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from bdpo_pl.comprehension import Estimator
from bdpo_pl.errors import InputError
from bdpo_pl.losses.balanced_dpo import BalancedDPOLoss, Weighting
from bdpo_pl.losses.base import PairScores, PairWeights, PreferenceLoss, require_not_negative


class SFTLoss(PreferenceLoss):
    """The chosen response's NLL per token, L = −log π_θ(y_w|x)/|y_w|: one part of a `WeightedSum`, or on its own."""

    needs_reference = False
    beta = 1.0

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        return -policy_chosen.float() / scores.chosen_length


class Outer(PreferenceLoss):
    """A loss built from other losses, which determine what it reads."""

    def _take_from(self, losses: Sequence[PreferenceLoss]) -> None:
        for loss in losses:
            if loss.needs_labels:
                raise InputError(
                    f"loss: {type(loss).__name__} reads single answers and no pairs, so it cannot be combined with "
                    "other losses; use it alone"
                )
        self._parts = tuple(losses)
        self.beta = losses[0].beta
        if len({loss.tail_weight for loss in losses}) > 1:
            whole = [type(loss).__name__ for loss in losses if loss.tail_weight is None and not reads_log_ratios(loss)]
            raise InputError(
                "loss: LDLoss weights tokens for all losses; "
                + (f"it cannot be combined with {', '.join(whole)}" if whole else "put one around them, not inside")
            )
        self.tail_weight = losses[0].tail_weight
        for name in ("needs_reference", "needs_comprehension", "needs_safety", "needs_all_pairs", "mixes_pairs"):
            setattr(self, name, any(getattr(loss, name) for loss in losses))
        reading = {loss.estimator for loss in losses if loss.needs_comprehension}
        if len(reading) > 1:
            raise InputError(
                f"loss: the losses use different estimators, {', '.join(sorted(reading))}; give all the same"
            )
        self.estimator = next(iter(reading), losses[0].estimator)

    def papers(self) -> list[str]:
        """Return the papers to cite, its own and those of each loss."""
        return list(dict.fromkeys([*super().papers(), *(paper for loss in self._parts for paper in loss.papers())]))

    def prepare(self, scores: PairScores) -> None:
        """Prepare each loss."""
        for loss in self._parts:
            loss.prepare(scores)

    def state_dict(self) -> dict[str, float]:
        """Return the results of `prepare` of each loss, with its number in front if there are several."""
        found = [loss.state_dict() for loss in self._parts]
        if len(found) == 1:
            return found[0]
        return {f"{i}.{name}": value for i, state in enumerate(found) for name, value in state.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the results of each loss."""
        for i, loss in enumerate(self._parts):
            prefix = f"{i}." if len(self._parts) > 1 else ""
            loss.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def weights(self, scores: PairScores) -> PairWeights | None:
        """Return the balance weights of the first loss that has any."""
        found = (loss.weights(scores) for loss in self._parts)
        return next((weights for weights in found if weights is not None), None)

    def rewards(
        self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores
    ) -> tuple[Tensor, Tensor] | None:
        """Return the rewards of the first loss, for the logs."""
        return self._parts[0].rewards(policy_chosen, policy_rejected, scores)


def reads_log_ratios(loss: PreferenceLoss) -> bool:
    """Return true if `loss` reads nothing of the policy but its two log-ratios, with balance weights or without."""
    if isinstance(loss, WeightedSum):
        return all(reads_log_ratios(part) for part in loss._parts)
    return (loss.two_log_ratios or isinstance(loss, BalancedDPOLoss | BalancedLoss)) and not loss.sft_weight


class WeightedSum(Outer):
    """L = Σ a_i·L_i, as MPO mixes losses (arXiv:2411.10442).

    Args:
        losses: losses L_i, each by its `class_path`.
        weights: weights a_i ≥ 0, one for each loss. Default: 1 each.

    Raises:
        InputError: there are no losses, or not as many weights as losses.
    """

    def __init__(self, losses: list[PreferenceLoss], weights: list[float] | None = None) -> None:
        factors = [1.0] * len(losses) if weights is None else weights
        if not losses or len(losses) != len(factors):
            raise InputError(f"loss: {len(losses)} losses and {len(factors)} weights; give one weight for each")
        for factor in factors:
            require_not_negative("weights", factor)
        self._take_from(losses)
        self.factors = factors
        self.two_log_ratios = all(loss.two_log_ratios and not loss.sft_weight for loss in losses)
        values = [loss.initial_value for loss in losses]
        if None not in values:
            self.initial_value = sum(a * v for a, v in zip(factors, values, strict=True) if v is not None)

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        total = policy_chosen.new_zeros(()).float()
        for factor, loss in zip(self.factors, self._parts, strict=True):
            total = total + factor * loss(policy_chosen, policy_rejected, scores)
        return total


class BalancedLoss(Outer):
    """Balance weights and scaling factor for any loss of two log-ratios, which then reads s·w_w·D_w and s·w_l·D_l.

    With `DPOLoss` it equals Balanced DPO.

    Args:
        loss: loss that reads only the two log-ratios of the policy (DPO, IPO, hinge, robust, Dr.DPO, APO, SafeDPO, …).
        tau: temperature of the `softmax` weighting, or `auto`; default as in `BalancedDPOLoss`: 0.25 for `pmi`.
        weighting: formula of the balance weights, `softmax` or `ratio`.
        estimator: estimator of comprehension: `pmi`, `pmi_sum`, `ifd` or `hsic`.
        scale: scaling factor s: a number > 0, or `norm`.
        max_weight_ratio: upper bound on the ratio of a pair's larger weight to its smaller one. Default: none.

    Raises:
        InputError: an argument is out of its range, or the loss reads more of the policy than its two log-ratios.
    """

    def __init__(
        self,
        loss: PreferenceLoss,
        tau: float | Literal["auto"] | None = None,
        weighting: Weighting = "softmax",
        estimator: Estimator = "pmi",
        scale: float | Literal["norm"] = 2.0,
        max_weight_ratio: float | None = None,
    ) -> None:
        if not loss.two_log_ratios or loss.needs_comprehension or loss.sft_weight:
            raise InputError(
                f"loss: {type(loss).__name__} as configured reads more of the policy than its two log-ratios, so "
                "balance weights do not apply to it; add an SFT term to it with WeightedSum"
            )
        balance = BalancedDPOLoss(loss.beta, True, tau, weighting, estimator, scale, max_weight_ratio=max_weight_ratio)
        self._take_from((balance, loss))
        self._parts = (balance,)
        self._balance, self._loss = balance, loss
        self.beta, self.estimator = loss.beta, estimator
        self.initial_value = loss.initial_value

    def papers(self) -> list[str]:
        """Return the papers to cite: that of the balance weights, and those of the loss."""
        return list(dict.fromkeys([*super().papers(), *self._loss.papers()]))

    def prepare(self, scores: PairScores) -> None:
        """Prepare the balance weights and the loss."""
        super().prepare(scores)
        self._loss.prepare(scores)

    def state_dict(self) -> dict[str, float]:
        """Return the results of `prepare` of the balance weights, and those of the loss with `loss.` in front."""
        return super().state_dict() | {f"loss.{name}": value for name, value in self._loss.state_dict().items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the results of both."""
        super().load_state_dict(state)
        self._loss.load_state_dict({k.removeprefix("loss."): v for k, v in state.items() if k.startswith("loss.")})

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        weights = self._balance.weights(scores)
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        assert scores.reference_chosen is not None
        assert scores.reference_rejected is not None
        return self._loss(
            scores.reference_chosen.float() + weights.scale * weights.chosen * chosen,
            scores.reference_rejected.float() + weights.scale * weights.rejected * rejected,
            scores,
        )


class WPOLoss(Outer):
    """WPO, arXiv:2406.11827, equation 2 without its weight alignment: w·L, w = min(1, exp(ℓ̄_w + ℓ̄_l)).

    A pair that the policy itself is likely to write counts more; w is a constant in the gradient. The paper's weight
    alignment needs the policy's whole distribution at each position, and the kernels keep only a sum for each
    response. TRL's `use_weighting` includes it.

    Args:
        loss: loss whose pairs are weighted.

    Raises:
        InputError: the loss weights tokens.
    """

    def __init__(self, loss: PreferenceLoss) -> None:
        if loss.tail_weight is not None:
            raise InputError("loss: WPO weights whole responses, and LDLoss weights their tokens; use only one of them")
        self._take_from((loss,))

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.mean_logps(policy_chosen.detach(), policy_rejected.detach())
        return (chosen + rejected).exp().clamp_max(1.0) * self._parts[0](policy_chosen, policy_rejected, scores)
