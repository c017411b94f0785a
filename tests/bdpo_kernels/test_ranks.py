"""The LM head split over two ranks against the whole one: by its vocabulary, in float64, and by FSDP2.

One pair of processes does both: to start it takes longer than either.
"""

import fsdp_ranks
import vocab_parallel_ranks
from ranks import each, run_ranks


def test_a_head_split_by_vocabulary_or_by_fsdp2_is_the_whole_one(tmp_path):
    """By vocabulary it sends three numbers a token; NeMo RL's bypass broke the hooks of FSDP (#2833)."""
    run_ranks(
        each, tmp_path, vocab_parallel_ranks.everything, fsdp_ranks.a_sharded_head, fsdp_ranks.a_head_past_its_hooks
    )
