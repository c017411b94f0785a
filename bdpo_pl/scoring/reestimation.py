"""Comprehension under the policy as it learns, in place of the reference's.

The paper (arXiv:2603.22829) names online estimation as an open question; this is the project's answer to it: the same
formula with π_θ, over every pair, each k optimiser steps.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.errors import InputError
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.scoring.scoring_pass import ScoringOptions, score_pairs, table_comprehension


class Reestimation:
    """The latest comprehension of every split under the policy.

    Args:
        every_n_steps: k, in optimiser steps; None never re-estimates.

    Raises:
        InputError: k is not at least 1.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"model.reestimate_every must be at least 1 optimiser step, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._step = 0
        self._values: dict[str, Tensor] = {}

    def check_fits(self, trainer: L.Trainer, loss: PreferenceLoss, options: ScoringOptions) -> None:
        """Raise `InputError` if there is nothing to re-estimate, or if ranks could not score apart from each other."""
        if self.every_n_steps is None:
            return
        if not (loss.needs_comprehension and options.comprehension):
            raise InputError(
                f"model.reestimate_every is set, but {type(loss).__name__} as configured reads no comprehension; "
                "remove the option or take a loss that does (BalancedDPOLoss: turn the balance on)"
            )
        # Where the weights are sharded, every forward pass needs every rank.
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(
                "model.reestimate_every needs the whole policy on each device (a single one, or ddp), not "
                f"{type(trainer.strategy).__name__}"
            )

    def due(self, step: int) -> bool:
        """Whether the comprehension is to be measured before optimiser step `step`, and has not been yet."""
        return self.every_n_steps is not None and step > self._step and step % self.every_n_steps == 0

    def update(
        self,
        policy: nn.Module,
        trainer: L.Trainer,
        data: PreferenceSplits,
        loss: PreferenceLoss,
        options: ScoringOptions,
        layout: RowLayout,
    ) -> None:
        """Score all pairs with `policy`; the ranks share them."""
        self._step = trainer.global_step
        rank_zero_info(f"Re-estimating comprehension on the policy at step {self._step}")
        for split in ("train", "held_out"):
            if split not in data.tables:
                continue
            table = data.tables[split]
            mine = np.array_split(np.arange(len(table)), trainer.world_size)[trainer.global_rank]
            values = torch.zeros(2, len(table), device=trainer.strategy.root_device)
            if len(mine):
                scores = score_pairs(
                    policy,
                    table,
                    mine,
                    layout=layout,
                    batch_tokens=options.batch_tokens,
                    pad_id=data.pad_id,
                    hsic=loss.estimator == "hsic",
                    context=trainer.precision_plugin.forward_context,
                )
                values[:, torch.from_numpy(mine)] = table_comprehension(scores, table.select(mine), loss.estimator).to(
                    values
                )
            self._values[split] = trainer.strategy.reduce(values, reduce_op="sum")
        if data.probe_indices is not None:
            probe = torch.from_numpy(data.probe_indices).to(self._values["train"].device)
            self._values["train_probe"] = self._values["train"].index_select(1, probe)

    def values(self, split: str, pair_index: Tensor) -> Tensor | None:
        """(2, B) comprehension of the pairs at `pair_index` of `split`, or None before the first re-estimation."""
        if split not in self._values:
            return None
        values = self._values[split] = self._values[split].to(pair_index.device)
        return values.index_select(1, pair_index)

    def state_dict(self) -> dict[str, Any]:
        """The values, and the step they were measured at: a resumed run goes on with the same."""
        return {"step": self._step, "values": {name: values.cpu() for name, values in self._values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._step, self._values = state["step"], dict(state["values"])
