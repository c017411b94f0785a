"""The processes that receive different data."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy

from bdpo_pl.parallel.context_parallel import ContextGroup


def data_ranks(trainer: L.Trainer) -> tuple[int, int]:
    """Return (number of this process, number of processes) among those that receive different data.

    Ranks that share a layer by tensor parallelism, or rows by context parallelism, also share their data.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        kwargs = trainer.strategy.distributed_sampler_kwargs
        return int(kwargs["rank"]), int(kwargs["num_replicas"])
    return trainer.global_rank, trainer.world_size


def counts_its_data(trainer: L.Trainer) -> bool:
    """Return true on one of the processes that receive the same data, so that sums over all processes count it once."""
    return trainer.global_rank % (trainer.world_size // data_ranks(trainer)[1]) == 0


def context_group(trainer: L.Trainer) -> ContextGroup | None:
    """Return the ranks that share the rows of this process's batches; None if the process reads them alone."""
    return getattr(trainer.strategy, "context_group", None)
