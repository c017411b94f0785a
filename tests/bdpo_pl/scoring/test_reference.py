"""Scores that several ranks compute: each with the whole reference, or with a part of it."""

import pytest
import reference_ranks
import torch
from makers import build_model
from ranks import run_ranks

from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.reference import Reference
from bdpo_pl.scoring.scoring_pass import ScoringOptions


@pytest.fixture(scope="module")
def table():
    g = torch.Generator().manual_seed(0)

    def ids(low, high):
        return torch.randint(5, 400, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    return PairTable.from_pairs([PreferencePair(ids(1, 20), ids(1, 12), ids(1, 12)) for _ in range(11)], [3, 8])


def test_a_live_reference_in_parts_scores_batches_of_unlike_size(table, tmp_path):
    """Each pass needs all ranks: one with less to score would leave the others waiting."""
    build_model().save_pretrained(tmp_path / "model")
    run_ranks(reference_ranks.unequal_batches, tmp_path, tmp_path, table)


def test_scores_are_not_shared_where_fsdp2_casts_more_than_autocast(table, tmp_path):
    """Embeddings and norms too; in float32 the scores are those of one process, to the last bit."""
    build_model().save_pretrained(tmp_path / "model")
    run_ranks(reference_ranks.other_products, tmp_path, tmp_path, table)


def test_ranks_that_find_other_chunks_missing_score_the_same_ones(table, tmp_path):
    run_ranks(reference_ranks.another_job_writes, tmp_path, tmp_path, table)


@pytest.mark.parametrize("architecture", ["phi", "qwen2"])
def test_scores_whose_heads_bias_was_rounded_are_found_no_more(architecture, tmp_path):
    """Only under autocast, and all other scores of earlier versions are."""
    build_model(architecture).save_pretrained(tmp_path)
    for precision, dtype in (("bf16-mixed", torch.float32), ("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        reference = Reference(ModelSource(str(tmp_path)), "precomputed", dtype, ScoringOptions())
        rounded = architecture == "phi" and precision == "bf16-mixed" and dtype == torch.float32
        assert reference._keeps_head_bias(Machine(precision=precision)) == rounded
