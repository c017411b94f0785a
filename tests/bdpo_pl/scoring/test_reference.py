"""Scores that several ranks compute: each with the whole reference, or with a part of it."""

import pytest
import reference_ranks
import torch
from makers import build_model
from ranks import run_ranks

from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair


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
