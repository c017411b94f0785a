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

from bdpo_pl.parallel.ranks import data_ranks
from bdpo_pl.parallel.state import TENSOR


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
        data_rank: number of this process's group, where groups share a layer; else `rank`.
        data_size: number of groups.
        writes: whether this process writes what its group has scored.
        barrier: waits for all of them.
        sum_over_ranks: adds a tensor over all of them.
        mesh: the devices that share a model which no device holds whole; None where each holds a whole one.
        whole_policy: whether each process has the whole policy in training.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "32-true"
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    data_size: int = 1
    writes: bool = True
    barrier: Callable[[], None] = lambda: None
    sum_over_ranks: Callable[[Tensor], Tensor] = _identity
    mesh: Any = None
    whole_policy: bool = True

    @classmethod
    def of(cls, trainer: L.Trainer) -> Machine:
        """Describe `trainer`, whose strategy has set up its environment."""
        strategy = trainer.strategy
        mesh = strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None
        return cls(
            strategy.root_device,
            str(trainer.precision),
            trainer.precision_plugin.forward_context,
            trainer.global_rank,
            trainer.world_size,
            *data_ranks(trainer),
            mesh is None or mesh[TENSOR].get_local_rank() == 0,
            strategy.barrier,
            lambda value: strategy.reduce(value, reduce_op="sum"),
            mesh,
            isinstance(strategy, SingleDeviceStrategy | DDPStrategy),
        )

    @property
    def together(self) -> bool:
        """Whether every forward pass needs every process, because none holds the whole model."""
        return self.mesh is not None
