"""The processes that receive different data."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy


def data_ranks(trainer: L.Trainer) -> tuple[int, int]:
    """Return (number of this process, number of processes) among those that receive different data.

    Ranks that share a layer by tensor parallelism also share its data.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        kwargs = trainer.strategy.distributed_sampler_kwargs
        return int(kwargs["rank"]), int(kwargs["num_replicas"])
    return trainer.global_rank, trainer.world_size
