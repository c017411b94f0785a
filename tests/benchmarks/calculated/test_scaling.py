"""The calculated page: its formulas against counts by hand, and the page in docs/ against the script."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.calculated.scaling import (
    PAGE,
    SHAPES,
    config_of,
    page,
    parameters,
    sent_by_context,
    sent_by_fsdp,
    sent_by_tensor,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(shape):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    embedding = model.get_input_embeddings().weight.numel()
    assert parameters(shape) == (sum(p.numel() for p in model.parameters()), embedding)


def test_bytes_sent_by_hand():
    # Three quarters of: 100 weights twice in two bytes, and their gradients in four.
    assert sent_by_fsdp(100, 4, 1, False, 0) == 0.75 * 800
    assert sent_by_fsdp(100, 4, 2, False, 0) == 0.75 * 400
    assert sent_by_fsdp(100, 4, 1, True, 10) == 0.75 * 440
    assert sent_by_fsdp(100, 1, 8, False, 0) == 0
    assert sent_by_tensor("7B", 10, 4, 1) == 0
    # 32 layers, hidden size 4,096, bfloat16: 6 sums a layer, one of the embedding, one of the head, and its numbers.
    assert sent_by_tensor("7B", 10, 4, 2) == 6 * 32 * 10 * 8192 + 10 * 8192 + 4 * (8192 + 12)


def test_bytes_exchanged_by_hand():
    assert sent_by_context("7B", 64, 1) == 0
    # Of 16 tokens on a GPU, three quarters; 32 layers, three passes; 4,096 in queries and outputs, 1,024 in keys.
    assert sent_by_context("7B", 64, 4) == 3 * 32 * 12 * 2 * (2 * 4096 + 2 * 1024)
    # Two GPUs to each key head: keys and values are sent twice.
    assert sent_by_context("7B", 64, 16) == 3 * 32 * 3.75 * 2 * (2 * 4096 + 2 * 2048)


def test_page_is_what_the_script_writes():
    assert PAGE.read_text(encoding="utf-8") == page()
