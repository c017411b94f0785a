"""A loss of your own, in Python and from the command line.

    python examples/own_loss.py
    PYTHONPATH=examples python -m bdpo_pl.fit --model.loss own_loss.SquaredHingeLoss --model.loss.margin 2

A loss gets the policy's log-probabilities of both responses, which carry the gradients, and a `PairScores` of what is
known of the pairs: reference log-probabilities, lengths, comprehension, safety. It returns the loss of each pair; the
caller takes the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdpo_pl.losses import PairScores, PreferenceLoss


class SquaredHingeLoss(PreferenceLoss):
    """Squared hinge on the difference of log-ratios: L = max(0, margin − β·(D_w − D_l))².

    Args:
        beta: scale of the log-ratios, β > 0.
        margin: difference of rewards beyond which a pair costs nothing.
    """

    def __init__(self, beta: float = 0.1, margin: float = 1.0) -> None:
        self.beta = beta
        self.margin = margin
        # The loss of any pair while policy and reference are one model; the first step is checked against it.
        self.initial_value = margin**2

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, scores: PairScores) -> Tensor:
        """Compute the loss of each pair, (B,) float32."""
        chosen, rejected = scores.log_ratios(policy_chosen, policy_rejected)
        return (self.margin - self.beta * (chosen - rejected)).clamp_min(0.0).square()


def main() -> Tensor:
    """Show the loss of two pairs: one that the policy has not moved yet, one that it has moved by 10 nats a side."""
    length = torch.tensor([12.0, 12.0])
    known = PairScores(length, length, torch.tensor([-20.0, -20.0]), torch.tensor([-20.0, -20.0]))
    losses = SquaredHingeLoss()(torch.tensor([-20.0, -10.0]), torch.tensor([-20.0, -30.0]), known)
    print(losses)
    return losses


if __name__ == "__main__":
    main()
