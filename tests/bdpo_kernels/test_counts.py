"""What a step costs beside its products: launches, waits, passes over the weight's gradient, memory. All counted."""

import pytest
import torch
import torch.nn.functional as F
from counting import Operators, products_of_a_gpu, recorded_launches

from bdpo_kernels import linear_preference_loss, linear_sequence_logprob
from bdpo_kernels.chunks import head_bytes

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("on_device")

N, D, V, B = 24, 8, 333, 4
PRODUCTS = {"mm", "addmm", "addmm_"}


def losses(chosen, rejected, index):
    return -F.logsigmoid(chosen - rejected)


def problem(dtype=torch.float32, N=N, D=D, V=V, B=B, device=None):
    hidden = torch.randn(N, D, device=device).to(dtype)
    weight = torch.randn(V, D, device=device).to(dtype)
    labels = torch.zeros(N, dtype=torch.long, device=device)
    ids = torch.arange(N, device=device) * 2 * B // N
    return hidden.requires_grad_(), weight.requires_grad_(), labels, ids


def step(hidden, weight, labels, ids, factor=1.0, **options):
    loss, *_ = linear_preference_loss(hidden, weight, labels, ids, losses, num_pairs=B, **options)
    (loss * factor if factor != 1.0 else loss).backward()


def test_one_row_kernel_a_chunk_and_no_other(device):
    """Log-probability and gradient of a chunk in one launch; what scales gradients ends at once where it is by 1."""
    with recorded_launches() as launches:
        step(*problem(), backend="triton")
    names = [name for name, *_ in launches]
    assert names == ["softmax_gradient", "sequence_sum", "scale_unless_one", "scale_unless_one"]


def test_a_chunk_more_is_two_launches_more(device):
    with recorded_launches() as launches:
        step(*problem(), backend="triton", chunk_bytes=6 * 336 * 4)
    names = [name for name, *_ in launches]
    assert names.count("softmax_gradient") == names.count("sequence_sum") == 4
    assert len(names) == 10


def test_scoring_reads_the_logits_once_and_writes_nothing_over_them(device):
    hidden, weight, labels, ids = problem()
    with recorded_launches() as launches, torch.no_grad():
        linear_sequence_logprob(hidden, weight, labels, ids, 2 * B, backend="triton")
    assert [name for name, *_ in launches] == ["token_logprob_forward", "sequence_sum"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_number_is_an_argument_in_float32(device, dtype):
    """Triton passes a Python float as float32, also beside float64 logits: constants are compiled in."""
    with recorded_launches() as launches:
        step(*problem(dtype), backend="triton", softcap=30.0, logit_scale=0.1)
        hidden, weight, labels, ids = problem(dtype)
        linear_sequence_logprob(hidden, weight, labels, ids, 2 * B, backend="triton", logit_scale=0.1)
    assert launches
    assert not [(name, a) for name, args, _ in launches for a in args if isinstance(a, float)]


@pytest.mark.parametrize("V", [333, 50_257])
def test_rows_of_an_odd_vocabulary_begin_at_multiples_of_16(device, V):
    with recorded_launches(run=False) as launches:
        step(*problem(torch.bfloat16, V=V), backend="triton")
    for args in (args for name, args, _ in launches if name == "softmax_gradient"):
        logits, gradient, strides = args[0], args[5], args[7:9]
        assert (logits.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
        assert strides[0] == strides[1]
        assert strides[0] % 16 == 0


def test_logits_of_a_single_chunk_take_the_memory_of_the_weights_gradient(device):
    """It is written after the last block of logits, so float32 logits cost no memory."""
    tensors = problem(torch.bfloat16)
    with recorded_launches(run=False) as launches:
        step(*tensors, backend="triton")
    addresses = {args[0].address for name, args, _ in launches if name == "softmax_gradient"}
    assert addresses == {tensors[1].grad.data_ptr()}


def test_a_frozen_head_projects_a_pair_that_is_too_long_for_a_chunk_once(device, backend):
    """The pair's factor multiplies rows of its hidden states' gradient when it is known."""
    hidden, weight, labels, _ = problem()
    ids = torch.arange(N) % 2
    results = []
    for chunk_bytes in (None, 5 * 336 * 4):
        h, w = hidden.detach().clone().requires_grad_(), weight.detach()
        with Operators() as operators:
            loss, *_ = linear_preference_loss(
                h, w, labels, ids, losses, num_pairs=1, chunk_bytes=chunk_bytes, backend=backend
            )
            loss.backward()
        results.append((loss.detach(), h.grad))
        parts = 1 if chunk_bytes is None else 5
        assert sum(name in PRODUCTS for name in operators.names()) == 2 * parts
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_three_products_and_no_pass_over_the_weights_gradient(device, backend):
    tensors = problem()
    # The interpreter's launches are left out: they copy their arguments.
    with Operators() as operators, recorded_launches(run=False):
        step(*tensors, backend=backend)
    assert sum(name in PRODUCTS for name in operators.names()) == 3
    passes = [name for name, sizes in operators.calls if V * D in sizes and name not in PRODUCTS]
    # A place for it, and views of it and of the weight.
    assert set(passes) <= {"empty", "t", "detach", "transpose", "alias"}


def test_a_factor_other_than_1_scales_each_gradient_once(device, backend):
    hidden, weight, labels, ids = problem()
    step(hidden, weight, labels, ids, backend=backend)
    other = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    step(*other, labels, ids, factor=0.25, backend=backend)
    assert torch.equal(other[0].grad, hidden.grad * 0.25)
    assert torch.equal(other[1].grad, weight.grad * 0.25)


def test_a_factor_of_1_leaves_every_bit(device, backend):
    """Also of a NaN's payload, and −0: it is not multiplied."""
    from bdpo_kernels.backends import load

    tensor = torch.randn(10_000)
    before = tensor.clone()
    version = tensor._version
    with Operators() as operators:
        load(backend).scale_(tensor, torch.ones(()))
    assert torch.equal(tensor, before)
    assert "mul_" not in operators.names()
    assert tensor._version == version
    load(backend).scale_(tensor, torch.tensor(3.0))
    assert torch.equal(tensor, before * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_lengths_no_value_is_waited_for(device, dtype):
    """On meta tensors, which have no values: whatever reads one raises."""
    lengths = [N // (2 * B)] * (2 * B)
    tensors = problem(dtype, device="meta")
    with recorded_launches(run=False), Operators() as operators:
        step(*tensors, backend="triton", check_labels=False, lengths=lengths)
        sums = linear_sequence_logprob(*tensors, 2 * B, backend="triton", check_labels=False, lengths=lengths)
        sums.sum().backward()
    assert not {"nonzero", "bincount", "_local_scalar_dense", "item"} & set(operators.names())


def test_without_lengths_one_value_is_waited_for(device, monkeypatch):
    waits, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(tensor.shape) or tolist(tensor))
    with Operators() as operators:
        step(*problem(), backend="triton", check_labels=False)
    assert waits == [(B + 1,)]
    assert not {"nonzero", "bincount", "_local_scalar_dense"} & set(operators.names())


def test_wrong_lengths_are_refused():
    hidden, weight, labels, ids = problem()
    right = [N // (2 * B)] * (2 * B)
    for wrong, message in (
        ([*right[:-1], right[-1] - 1], r"lengths\[7\] is 2, but 3 tokens"),
        (right[:-1], "must be 8 ints"),
        ([*right[:-1], -1], "must be 8 ints"),
        ([N] * 8, "there are only 24"),
    ):
        for call in (
            lambda lengths: step(hidden, weight, labels, ids, lengths=lengths),
            lambda lengths: linear_sequence_logprob(hidden, weight, labels, ids, 2 * B, lengths=lengths),
        ):
            with pytest.raises(ValueError, match=message):
                call(wrong)


def test_lengths_change_nothing(device, backend):
    hidden, weight, labels, ids = problem()
    labels[::5] = -100
    ids = ids[torch.randperm(N)]
    lengths = torch.bincount(ids[labels != -100], minlength=2 * B).tolist()
    options = {"backend": backend, "chunk_bytes": 7 * 333 * 4}
    results = []
    for more in ({}, {"lengths": lengths}):
        h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        step(h, w, labels, ids, **options, **more)
        sums = linear_sequence_logprob(h, w, labels, ids, 2 * B, **options, **more)
        results.append((h.grad.clone(), w.grad.clone(), sums.detach(), *torch.autograd.grad(sums.sum(), (h, w))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def before(N, V, D, weight_dtype):
    """Bytes of logits and the weight's gradient at the peak of version 0.1.0, whose logits were bfloat16.

    Its memory plan left out that a sum in float32 is cast to a weight's bfloat16 while both exist.
    """
    logits = min(N, max(512, (1 << 30) // (2 * V))) * V * 2
    return logits + {None: 0, torch.float32: 4, torch.bfloat16: 6}[weight_dtype] * V * D


@pytest.mark.parametrize(
    ("D", "V", "tokens", "trains_head", "chunks"),
    [
        (3584, 152_064, 4096, True, 1),
        (3584, 152_064, 8192, True, 1),
        (3584, 152_064, 16_384, True, 8),
        (4096, 128_256, 8192, True, 1),
        (4096, 32_768, 8192, True, 1),
        (3584, 256_000, 8192, True, 1),
        (3584, 152_064, 1000, False, 2),
        (3584, 152_064, 8192, False, 3),
        (4096, 32_000, 2048, False, 2),
    ],
)
def test_peak_memory_at_real_shapes_is_what_is_planned_and_no_more_than_with_half_precision_logits(
    device, D, V, tokens, trains_head, chunks
):
    """On meta tensors of the benchmark's shapes: logits, gradients and temporaries, counted as they come and go."""
    pairs = 4
    hidden, weight, labels, ids = problem(torch.bfloat16, tokens, D, V, pairs, "meta")
    weight.requires_grad_(trains_head)
    with recorded_launches(run=False), products_of_a_gpu() as products, Operators() as operators:
        loss, *_ = linear_preference_loss(
            hidden, weight, labels, ids, losses, num_pairs=pairs, backend="triton", check_labels=False,
            lengths=[tokens // (2 * pairs)] * (2 * pairs),
        )  # fmt: skip
        loss.backward()
    dtype = weight.dtype if trains_head else None
    planned = head_bytes(tokens, V, D, torch.bfloat16, torch.device("cuda"), dtype)
    assert planned <= before(tokens, V, D, dtype)
    assert products["hidden_product"] == chunks
    # The hidden states' gradient, their copies in a chunk, indices and sums: a few numbers a token.
    others = (2 * tokens + 2 * -(-tokens // chunks)) * D * 2 + (1 << 20)
    assert operators.peak <= planned + others
