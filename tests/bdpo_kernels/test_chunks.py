"""Chunks are few, even, and hold what they may."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bdpo_kernels import linear_head, linear_preference_loss
from bdpo_kernels.chunks import chunk_sizes, even_sizes, head_bytes, pairs_evenly, split_evenly

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


@given(number=st.integers(1, 20_000), most=st.integers(1, 6000), columns=st.sampled_from([0, 896, 3584, 4096]))
def test_parts_take_no_more_waves_than_even_ones(number, most, columns):
    def waves(sizes):
        across = -(-columns // 256) if columns else 132
        return sum(-(-(-(-size // 128) * across) // 132) for size in sizes)

    sizes = even_sizes(number, most, columns, processors=132)
    parts = -(-number // most)
    assert sum(sizes) == number
    assert all(0 < size <= most for size in sizes)
    assert len(sizes) <= parts
    even = -(-number // parts)
    assert waves(sizes) <= waves([min(even, number - start) for start in range(0, number, even)])


def test_parts_of_whole_tiles_where_they_save_a_wave():
    assert even_sizes(8192, 3018, 0, 132) == [2816, 2816, 2560]
    assert even_sizes(8192, 8192, 3584, 132) == [8192]
    # Two tiles either way: even parts are the better ones.
    assert even_sizes(130, 128) == [65, 65]


def before(N, V, D, device, weight_dtype):
    """Bytes of logits and the weight's gradient that version 0.1.0 planned, whose logits were bfloat16."""
    logits = min(N, max(512, {"cpu": 1 << 26, "cuda": GIB}[device] // (2 * V))) * V * 2
    return logits + (0 if weight_dtype is None else 4 * V * D)


SIZES = [(152_064, 3584), (128_256, 4096), (32_768, 4096), (256_000, 3584), (32_000, 512), (50_257, 768)]


@pytest.mark.parametrize(("V", "D"), SIZES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_float32_logits_are_planned_with_no_more_memory_than_half_precision_ones_were(V, D, device, weight_dtype):
    for N in (3, 10, 100, 1000, 2047, 4096, 8192, 30_000):
        planned = head_bytes(N, V, D, torch.bfloat16, torch.device(device), weight_dtype)
        # With a trained weight in bfloat16, the old plan left out that its gradient is cast while its sum exists.
        cast = 2 * V * D if weight_dtype == torch.bfloat16 else 0
        assert planned <= before(N, V, D, device, weight_dtype) + cast, N


@pytest.mark.parametrize(("V", "D"), SIZES)
def test_a_trained_half_precision_weight_is_within_the_old_plan_up_to_7000_tokens(V, D):
    """Beyond, the old plan was below what was used, by the cast; what was used is still not reached."""
    for N in (3, 100, 1000, 4096):
        planned = head_bytes(N, V, D, torch.bfloat16, torch.device("cuda"), torch.bfloat16)
        assert planned <= before(N, V, D, "cuda", torch.bfloat16), N


def sizes_of(V, D, weight_dtype):
    half = torch.bfloat16
    return chunk_sizes(None, V, D, half, torch.float32, half, torch.device("cuda"), weight_dtype)


def test_a_batch_of_a_7b_head_goes_through_in_one_chunk_and_in_few_beyond():
    sizes = sizes_of(152_064, 3584, torch.bfloat16)
    assert sizes.of(4096, weight_grad=True).tokens == 4096
    assert sizes.of(8192, weight_grad=True).tokens == 8192
    # As many as bfloat16 logits in 1 GiB took.
    assert -(-16_384 // sizes.of(16_384, weight_grad=True).tokens) <= 6
    assert -(-8192 // sizes.of(8192, weight_grad=False).tokens) == 3


@pytest.mark.parametrize(("V", "D"), SIZES)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_blocks_of_logits_have_rows_enough_for_the_product(V, D, weight_dtype, weight_grad):
    """Fewer than 256 would read the weight for longer than they compute."""
    sizes = sizes_of(V, D, weight_dtype)
    for N in (1024, 4096, 8192, 30_000):
        division = sizes.of(N, weight_grad)
        largest = max(even_sizes(N, division.tokens))
        assert sizes.block(largest, division) >= 250, N


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.usefixtures("on_device")
def test_both_projections_of_a_long_pair_have_the_same_logits(backend, exact, monkeypatch):
    """So log-probability and gradient are those of one model. In other chunks sums may differ by their rounding."""
    N, V, D = 24, 60, 576
    hidden, weight = torch.randn(N, D).bfloat16(), (torch.randn(V, D) / D**0.5).bfloat16()
    labels, ids = torch.randint(V, (N,)), torch.arange(N) % 2
    written, write = [], linear_head.write_logits

    def recorded(out, rows, *rest):
        write(out, rows, *rest)
        written.append((rows.clone(), out.clone()))

    monkeypatch.setattr(linear_head, "write_logits", recorded)
    results = []
    for tokens, projections in ((N, 1), (5, 2)):
        written.clear()
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss, *both = linear_preference_loss(
            *leaves, labels, ids, lambda c, r, i: -F.logsigmoid(0.1 * (c - r)), num_pairs=1, backend=backend,
            chunk_bytes=tokens * 64 * (4 if exact else 2), exact=exact,
        )  # fmt: skip
        loss.backward()
        results.append([loss.detach(), *both, *(leaf.grad for leaf in leaves)])
        once = len(written) // projections
        assert sum(len(rows) for rows, _ in written[:once]) == N
        for first, last in zip(written[:once], written[-once:], strict=True):
            assert all(map(torch.equal, first, last))
    (*numbers, of_hidden, of_weight), (*in_parts, hidden_in_parts, weight_in_parts) = results
    for one, other in zip(numbers, in_parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if exact else 1e-2, atol=0)
    torch.testing.assert_close(of_hidden, hidden_in_parts, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(of_weight, weight_in_parts, rtol=1e-2, atol=1e-2)
