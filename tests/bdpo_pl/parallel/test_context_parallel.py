"""Rows of which each rank has some positions: the same log-probabilities and gradients as whole rows."""

import context_ranks
import layout_ranks
import pytest
from makers import build_model
from ranks import each, run_ranks

from bdpo_pl.errors import InputError
from bdpo_pl.parallel.context_parallel import check_context_parallel
from bdpo_pl.parallel.fsdp2 import ShardedStrategy


def test_two_ranks_read_what_one_reads(tmp_path):
    run_ranks(
        each,
        tmp_path,
        layout_ranks.layouts_are_chosen_together,
        context_ranks.parts_equal_the_whole,
        context_ranks.layers_see_half_of_the_positions,
        context_ranks.block_masks_are_of_whole_rows,
        context_ranks.rows_read_alone_are_as_before,
        context_ranks.what_differs_is_refused,
    )


def test_heads_that_cannot_be_divided_are_refused():
    with pytest.raises(
        InputError, match="is 3, which does not divide the 4 attention heads of it; set it to a divisor"
    ):
        check_context_parallel(build_model("llama").config, 3, "it")


def test_rows_and_layers_are_not_shared_at_once():
    with pytest.raises(InputError, match="devices share either rows or layers; set one of them to 1"):
        ShardedStrategy(tensor_parallel_size=2, context_parallel_size=2)
    with pytest.raises(InputError, match="context_parallel_size must be at least 1, got 0"):
        ShardedStrategy(context_parallel_size=0)
