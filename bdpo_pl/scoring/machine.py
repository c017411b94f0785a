"""The device, the precision and the processes with which scores are computed, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor


def _identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Machine:
    """One of the processes that share the scoring.

    Attributes:
        device: device of the model.
        precision: Lightning's name of the precision.
        context: function that returns the context of a forward pass, for autocast.
        rank: number of this process.
        world_size: number of processes.
        barrier: function that waits for all processes.
        sum_over_ranks: function that sums a tensor over all processes.
        max_over_ranks: function that takes the largest value of a tensor over all processes.
        together: true if the model is split over the processes, so that every forward pass needs all of them.
        whole_policy: true if each process has the whole policy during training.
        cpu_offload: true if the parts of a split model are kept in the host's memory.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "32-true"
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    sum_over_ranks: Callable[[Tensor], Tensor] = _identity
    together: bool = False
    whole_policy: bool = True
    cpu_offload: bool = False
    max_over_ranks: Callable[[Tensor], Tensor] = _identity

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
            getattr(strategy, "cpu_offload", False),
            lambda value: strategy.reduce(value, reduce_op="max"),
        )
