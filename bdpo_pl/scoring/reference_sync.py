"""A reference that follows the policy: TR-DPO (arXiv:2404.09656), equations 4 and 5.

Every k optimiser steps, π_ref ← α·π_θ + (1−α)·π_ref, weight by weight: α = 1 replaces the reference, and a smaller α
mixes the two. Because the reference moves with the policy, the policy can move further from its initial weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from bdpo_pl.errors import InputError
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.reference import Reference


@dataclass
class SyncOptions:
    """Options of a reference that follows the policy, as in TR-DPO (arXiv:2404.09656). The reference is kept live.

    Args:
        every: number of optimiser steps between two updates of the reference. Default: never updated.
        mixup: α, the share of the policy's weights in the new reference; 1 replaces the reference's weights.

    Raises:
        InputError: a value is out of range.
    """

    every: int | None = None
    mixup: float = 0.6

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise InputError(f"model.reference_sync.every must be at least 1 optimiser step, got {self.every}")
        if not 0.0 < self.mixup <= 1.0:
            raise InputError(f"model.reference_sync.mixup must be above 0 and at most 1, got {self.mixup}")


class ReferenceSync:
    """Updates of the reference's weights from the policy: exactly one at each step where one is due.

    Args:
        options: options of the updates.
    """

    def __init__(self, options: SyncOptions) -> None:
        self.options = options
        self._step = 0
        self._moved = False

    def check_fits(self, machine: Machine, mode: str, own: bool, adapted: bool) -> None:
        """Raise `InputError` if the reference cannot follow the policy.

        Args:
            machine: device and processes of the run.
            mode: mode of the reference.
            own: true if policy and reference start from the same model, so that both have the same weights.
            adapted: true if the policy is trained by adapters.
        """
        if self.options.every is None:
            return
        for hindered, why in (
            (mode != "live", f"needs a live reference, and model.reference_mode is {mode}; set it to live"),
            (not own, "needs the policy's own model as the reference; leave out model.reference"),
            (adapted, "mixes whole weights, and model.lora trains adapters; leave out one of them"),
            (
                not machine.whole_policy,
                "needs the whole policy on each device (a single one, or ddp), and this strategy splits it",
            ),
        ):
            if hindered:
                raise InputError(f"model.reference_sync {why}")

    def begin(self, step: int, dtype: torch.dtype) -> None:
        """Begin a fit at optimiser step `step`, and warn of updates that the `dtype` of the reference would lose.

        An earlier fit of the same module may have come further.
        """
        self._step = min(self._step, step)
        if self.options.every is not None and self.options.mixup < 0.5 and dtype.itemsize < 4:
            rank_zero_warn(
                f"model.reference_sync.mixup is {self.options.mixup:g}, and the reference's weights are in "
                f"{str(dtype).removeprefix('torch.')}: it does not follow small changes of the policy, which rounding "
                "loses; use trainer.precision bf16-mixed, or a mixup of at least 0.5"
            )

    def due(self, step: int) -> bool:
        """Return true if the reference must still be updated after optimiser step `step`."""
        every = self.options.every
        return every is not None and step > self._step and step % every == 0

    def follow(self, step: int, policy: nn.Module, reference: Reference | None) -> None:
        """Mix the weights of `policy` into those of `reference`, if that is due after optimiser step `step`."""
        if self.due(step):
            assert reference is not None
            assert reference.model is not None
            mix(policy, reference.model, self.options.mixup)
            self._step, self._moved = step, True
            rank_zero_info(f"The reference follows the policy at step {step} (α {self.options.mixup:g})")

    def state_dict(self, reference: Reference | None) -> dict[str, Any]:
        """Return the step of the last update and the weights of `reference`, which no file has; empty before one."""
        if not self._moved or reference is None or reference.model is None:
            return {}
        weights = {name: value.detach().cpu() for name, value in reference.model.named_parameters()}
        return {"step": self._step, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], reference: Reference | None) -> None:
        """Restore a saved state, for an exact resume."""
        if self.options.every is None or not state or reference is None or reference.model is None:
            return
        self._step, self._moved = state["step"], True
        for name, weight in reference.model.named_parameters():
            weight.copy_(state["weights"][name])


@torch.no_grad()
def mix(policy: nn.Module, reference: nn.Module, share: float) -> None:
    """Set each weight of `reference` to `share` of that of `policy` and the rest of its own, in place."""
    trained = dict(policy.named_parameters())
    for name, weight in reference.named_parameters():
        weight.lerp_(trained[name].to(weight), share)
