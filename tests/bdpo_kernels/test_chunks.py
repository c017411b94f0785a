"""Chunks are few, even, and hold what they may."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdpo_kernels.chunks import chunk_sizes, pairs_evenly, split_evenly

GIB = 1 << 30


def divisions(number):
    """Every way to cut a row of `number` pairs into consecutive ranges."""
    for cuts in itertools.product([False, True], repeat=number - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), number]
        yield list(itertools.pairwise(edges))


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=7), most=st.integers(1, 12))
def test_pairs_make_as_few_chunks_as_can_be_and_the_largest_is_as_small_as_can_be(counts, most):
    def size(chunk):
        return sum(counts[chunk[0] : chunk[1]])

    def allowed(chunks):
        return all(size(chunk) <= most or chunk[1] - chunk[0] == 1 for chunk in chunks)

    found = pairs_evenly(counts, most)
    assert [chunk[0] for chunk in found] + [len(counts)] == [0] + [chunk[1] for chunk in found]
    assert allowed(found)
    possible = [chunks for chunks in divisions(len(counts)) if allowed(chunks)]
    fewest = min(map(len, possible))
    assert len(found) == fewest
    assert max(map(size, found)) == min(max(map(size, chunks)) for chunks in possible if len(chunks) == fewest)


@given(number=st.integers(0, 40), most=st.integers(1, 12))
def test_tokens_are_split_into_few_even_parts(number, most):
    parts = split_evenly(torch.arange(number), most)
    assert len(parts) == -(-number // most)
    assert torch.cat([*parts, torch.empty(0, dtype=torch.long)]).tolist() == list(range(number))
    assert all(0 < len(part) <= most for part in parts)
    assert not parts or max(map(len, parts)) <= -(-number // len(parts))


@pytest.mark.parametrize(("V", "D"), [(152_064, 3584), (128_256, 4096), (32_768, 4096), (256_000, 3584), (32_000, 512)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_float32_logits_take_no_more_memory_than_half_precision_ones_did(V, D, device, grad_dtype):
    """Logits, sum and cast of the weight's gradient together, against a chunk of bfloat16 logits beside both."""
    half, single = torch.bfloat16, torch.float32
    before = max({"cpu": 1 << 26, "cuda": GIB}[device], 512 * V * 2) + 4 * V * D
    before += 2 * V * D if grad_dtype == half else 0
    sizes = chunk_sizes(None, V, D, half, single, torch.device(device), grad_dtype)
    cast = grad_dtype.itemsize * V * D if grad_dtype != single else 0
    assert max(sizes.several * V * 4, cast) + 4 * V * D <= before
    if grad_dtype == half:
        assert sizes.one * V * 4 + grad_dtype.itemsize * V * D <= before
    else:
        assert sizes.one == sizes.several
    assert sizes.plain * V * 4 <= before - 4 * V * D - cast


def test_a_batch_of_a_7b_head_goes_through_in_one_chunk_and_in_few_beyond():
    sizes = chunk_sizes(None, 152_064, 3584, torch.bfloat16, torch.float32, torch.device("cuda"), torch.bfloat16)
    assert sizes.of(4096, weight_grad=True) == 4096
    # As many as bfloat16 logits in 1 GiB took.
    assert -(-8192 // sizes.of(8192, weight_grad=True)) == 3
    assert sizes.of(4096, weight_grad=False) == sizes.plain == 1765
