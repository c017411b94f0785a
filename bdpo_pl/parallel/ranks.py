"""Which processes are given different data."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy


def data_ranks(trainer: L.Trainer) -> tuple[int, int]:
    """(number of this process, number of processes) among those that are given different data.

    Ranks that share a layer by tensor parallelism share its data too.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        kwargs = trainer.strategy.distributed_sampler_kwargs
        return int(kwargs["rank"]), int(kwargs["num_replicas"])
    return trainer.global_rank, trainer.world_size
