"""Fixtures of the tests that load pairs: a tokenizer of pairs, the loading, and a file that is a mess."""

import pytest
from makers import build_tokenizer, messy_safe_rlhf_rows, write_jsonl

from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation


@pytest.fixture(scope="module")
def tokenizer():
    return PairTokenizer(build_tokenizer())


@pytest.fixture
def load(tokenizer):
    def run(path, max_length=256, truncation="drop", seed=0, **options):
        window = Truncation(max_length, truncation)
        return load_pairs("train", str(path), tokenizer, window, LoadOptions(**options), seed=seed)

    return run


@pytest.fixture
def messy_safe_rlhf(tmp_path):
    return write_jsonl(tmp_path / "safe_rlhf.jsonl", messy_safe_rlhf_rows())
