"""Where scores are computed: the device, the precision and the processes of a Trainer, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor


def _identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Machine:
    """One process among those that share the scoring.

    Attributes:
        device: where the model lies.
        precision: Lightning's name of the precision.
        context: entered around each forward pass, for autocast.
        rank: number of this process.
        world_size: number of processes.
        barrier: waits for all of them.
        sum_over_ranks: adds a tensor over all of them.
        together: whether the processes share one model that none holds whole, so that each pass needs all of them.
        whole_policy: whether each process has the whole policy in training.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "32-true"
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    sum_over_ranks: Callable[[Tensor], Tensor] = _identity
    together: bool = False
    whole_policy: bool = True

    @classmethod
    def of(cls, trainer: L.Trainer) -> Machine:
        """Describe `trainer`, whose strategy has set up its environment."""
        strategy = trainer.strategy
        return cls(
            strategy.root_device,
            str(trainer.precision),
            trainer.precision_plugin.forward_context,
            trainer.global_rank,
            trainer.world_size,
            strategy.barrier,
            lambda value: strategy.reduce(value, reduce_op="sum"),
            isinstance(strategy, ModelParallelStrategy),
            isinstance(strategy, SingleDeviceStrategy | DDPStrategy),
        )
