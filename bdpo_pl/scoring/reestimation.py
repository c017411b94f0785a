"""Comprehension under the policy during training, instead of under the reference.

The paper (arXiv:2603.22829) leaves online estimation as an open question. This project answers it with the same formula
under π_θ, computed over every pair after every k optimiser steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.scores import SplitScores, score_splits, table_comprehension
from bdpo_pl.scoring.scoring_pass import ScoringOptions, score_pairs


class Reestimation:
    """The latest comprehension of every split under the policy.

    Args:
        every_n_steps: k, the number of optimiser steps between two estimates; None: no re-estimation.

    Raises:
        InputError: k is not at least 1.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"model.reestimate_every must be at least 1 optimiser step, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._step = 0
        self._values: dict[str, Tensor] = {}

    def check_fits(self, machine: Machine, loss: PreferenceLoss, options: ScoringOptions) -> None:
        """Raise `InputError` if the loss reads no comprehension, or if the policy is split over the ranks."""
        if self.every_n_steps is None:
            return
        if not (loss.needs_comprehension and options.comprehension):
            raise InputError(
                f"model.reestimate_every is set, but {type(loss).__name__} as configured reads no comprehension; "
                "remove the option or choose a loss that does (BalancedDPOLoss: turn the balance on)"
            )
        # With sharded weights, every forward pass needs every rank.
        if not machine.whole_policy:
            raise InputError(
                "model.reestimate_every needs the whole policy on each device (a single one, or ddp), and this "
                "strategy splits it"
            )

    @property
    def measured(self) -> bool:
        """True once comprehension has been measured on the policy."""
        return bool(self._values)

    def begin(self, step: int) -> None:
        """Begin a fit at optimiser step `step`; an earlier fit of the same module may have come further."""
        self._step = min(self._step, step)

    def due(self, step: int) -> bool:
        """Return true if comprehension must still be measured before optimiser step `step`."""
        return self.every_n_steps is not None and step > self._step and step % self.every_n_steps == 0

    def update(
        self,
        step: int,
        policy: CausalLM,
        machine: Machine,
        splits: PreferenceSplits,
        loss: PreferenceLoss,
        options: ScoringOptions,
        layout: RowLayout,
    ) -> None:
        """Score all pairs with `policy` before optimiser step `step`; the ranks divide them."""
        self._step = step
        rank_zero_info(f"Re-estimating comprehension on the policy at step {step}")

        def comprehension(_: str, table: PairTable) -> SplitScores:
            mine = np.array_split(np.arange(len(table)), machine.world_size)[machine.rank]
            values = torch.zeros(2, len(table), device=machine.device)
            if len(mine):
                scores = score_pairs(
                    policy,
                    table,
                    mine,
                    layout=layout,
                    batch_tokens=options.batch_tokens,
                    pad_id=splits.pad_id,
                    hsic=loss.estimator == "hsic",
                    context=machine.context,
                )
                own = table_comprehension(scores, table.select(mine), loss.estimator)
                values[:, torch.from_numpy(mine)] = own.to(values)
            return SplitScores(comprehension=machine.sum_over_ranks(values))

        for name, scores in score_splits(splits, comprehension).items():
            assert scores.comprehension is not None
            self._values[name] = scores.comprehension

    def values(self, split: str, pair_index: Tensor) -> Tensor | None:
        """Return the (2, B) comprehension of the pairs at `pair_index` of `split`; None before the first estimate."""
        if split not in self._values:
            return None
        values = self._values[split] = self._values[split].to(pair_index.device)
        return values.index_select(1, pair_index)

    def state_dict(self) -> dict[str, Any]:
        """Return the values and the step of their measurement, so that a resumed run uses the same."""
        return {"step": self._step, "values": {name: values.cpu() for name, values in self._values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self._step, self._values = state["step"], dict(state["values"])
