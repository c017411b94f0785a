"""Fixtures of the tests of GCG: a small model and its tokenizer."""

import pytest
from makers import build_model, build_tokenizer, large


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return large(build_model()).eval()
