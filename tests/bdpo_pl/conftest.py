"""Fixtures that the tests of bdpo_pl share, and the environment they run in."""

import os
from pathlib import Path

import pytest
import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    # Read when the kernels are first imported: with no GPU their Triton code runs in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def chat_tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A saved Qwen2 with its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def preference_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", preference_rows(40))
