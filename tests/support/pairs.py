"""Pairs for tests of losses: what the policy says of them and what is known, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bdpo_pl.losses import PairScores


@dataclass(frozen=True)
class Pairs(PairScores):
    """Scores of B pairs, with the policy's log-probabilities beside them."""

    # Placed first by `pairs_of`; a dataclass with defaults before it cannot have them without.
    policy_chosen: Tensor | None = None
    policy_rejected: Tensor | None = None

    @property
    def policy(self) -> tuple[Tensor, Tensor]:
        assert self.policy_chosen is not None
        assert self.policy_rejected is not None
        return self.policy_chosen, self.policy_rejected

    def under(self, loss) -> Tensor:
        """The loss of each pair."""
        return loss(*self.policy, self)


def pairs_of(policy_chosen, policy_rejected, *scores, **more) -> Pairs:
    return Pairs(*scores, policy_chosen=policy_chosen, policy_rejected=policy_rejected, **more)
