"""The LM head split over two ranks against the whole one in float64."""

import vocab_parallel_ranks
from ranks import run_ranks


def test_split_vocabulary_equals_the_whole_and_sends_three_numbers_a_token(tmp_path):
    run_ranks(vocab_parallel_ranks.everything, tmp_path)
