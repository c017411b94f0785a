"""What each of two ranks does in the tests of scores that they compute together."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from makers import build_model, build_tokenizer

from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.losses import DPOLoss
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.scoring.cache import ScoreCache
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.reference import Reference
from bdpo_pl.scoring.scoring_pass import ScoringOptions, score_pairs, score_table


def reduced(value, op):
    dist.all_reduce(value, op)
    return value


def of_two(rank, **options):
    return Machine(
        rank=rank,
        world_size=2,
        barrier=dist.barrier,
        sum_over_ranks=lambda value: reduced(value, dist.ReduceOp.SUM),
        max_over_ranks=lambda value: reduced(value, dist.ReduceOp.MAX),
        **options,
    )


def scores(machine, folder, table, mode, index, **options):
    """Scores of the pairs at `index` by a reference of the model in `folder`."""
    found = Reference(ModelSource(str(folder / "model")), mode, torch.float32, ScoringOptions(**options), "never")
    splits = PreferenceSplits({"train": table}, build_tokenizer(), Truncation(64), "none")
    found.prepare(machine, splits, DPOLoss())
    return found.scores("train", index)


def unequal_batches(rank, folder, table):
    """Eight pairs on one rank, which need several passes, and one on the other, which needs one."""
    mine = torch.arange(8) if rank == 0 else torch.tensor([9])
    found = scores(of_two(rank, together=True), folder, table, "live", mine, batch_tokens=64)
    alone = scores(Machine(), folder, table, "live", mine, batch_tokens=64)
    assert torch.equal(found.reference, alone.reference)
    assert torch.equal(found.comprehension, alone.comprehension)


def other_products(rank, folder, table):
    """One process fills the cache, then two that hold the model in parts read it, or score where it is not theirs."""
    everything = torch.arange(len(table))
    for precision, context, keys in (
        ("32-true", nullcontext, 1),
        ("bf16-mixed", partial(torch.autocast, "cpu", torch.bfloat16), 2),
    ):
        options = {"precision": precision, "context": context}
        root = folder / precision
        one = root if rank == 0 else folder / "other"
        alone = scores(Machine(**options), folder, table, "precomputed", everything, cache_dir=str(one))
        dist.barrier()
        found, fresh = (
            scores(of_two(rank, together=True, **options), folder, table, "precomputed", everything, cache_dir=str(at))
            for at in (root, folder / f"fresh-{precision}")
        )
        assert len(list(root.glob("scores/*"))) == keys
        assert torch.equal(found.reference, fresh.reference)
        assert torch.equal(found.reference, alone.reference) == (keys == 1)


def another_job_writes(rank, folder, table):
    """Another job with the same key writes chunks after rank 1 has looked for them, and before rank 0 has."""
    model = build_model().eval()
    alone = score_pairs(model, table, range(len(table)), batch_tokens=1)
    for name, written in (("some", {0}), ("all", {0, 1, 2})):
        cache = ScoreCache(folder / name, {}, len(table), 4)
        if rank == 0:
            for chunk in written:
                cache.save(chunk, score_pairs(model, table, cache.indices(chunk), batch_tokens=1))
        else:
            cache.load = partial(unless_early, cache.load, written)
        dist.barrier()
        options = ScoringOptions(batch_tokens=1)
        found = score_table("train", table, lambda: model, cache, options, machine=of_two(rank))
        np.testing.assert_array_equal(found.reference, alone.reference)


def unless_early(load, early, chunk):
    if chunk in early:
        early.remove(chunk)
        return None
    return load(chunk)
