"""linear_sequence_logprob and linear_preference_loss against float64 autograd, on both backends."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdpo_kernels import VocabShard, linear_head, linear_preference_loss, linear_sequence_logprob
from bdpo_kernels.transform import LogitTransform

IGNORED = -100
# Sums of about ten tokens of size ~5; half precision rounds the logits themselves.
TOLERANCES = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2e-2, "rtol": 2e-2},
    torch.bfloat16: {"atol": 1e-1, "rtol": 1e-1},
}
OPTIONS = [
    {},
    {"bias": True},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 2.0, "logit_scale": -1.5, "bias": True},
]
WEIGHTS = torch.tensor([1.0, 0.25, 2.0])


def loss_fn(chosen, rejected, pair_index):
    """A balanced loss in form: each pair has weights of its own."""
    scale = 1.0 + pair_index.to(chosen.device) * 0.5
    weights = WEIGHTS.to(chosen)[pair_index % 3]
    return -weights * F.logsigmoid(0.3 * (scale * chosen - 0.7 * rejected))


def case(dtype, device, N=19, D=8, V=50, B=3, bias=False):
    """N tokens of 2B sequences in any order, a fifth of them ignored."""
    hidden = torch.randn(N, D, device=device, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, D, device=device, dtype=torch.float64) / 2).to(dtype)
    b = torch.randn(V, device=device, dtype=torch.float64).to(dtype) if bias else None
    labels = torch.randint(V, (N,), device=device)
    labels[::5] = IGNORED
    return hidden, weight, b, labels, torch.randint(2 * B, (N,), device=device)


def oracle_logps(hidden, weight, bias, labels, ids, S, softcap, logit_scale):
    x = F.linear(hidden, weight, bias)
    u = logit_scale * (softcap * torch.tanh(x / softcap) if softcap else x)
    token = torch.log_softmax(u, -1).gather(-1, labels.clamp(min=0).long()[:, None]).squeeze(-1)
    return x.new_zeros(S).index_add(0, ids.long(), torch.where(labels != IGNORED, token, 0.0))


def oracle(tensors, labels, ids, B, softcap=None, logit_scale=1.0):
    """Loss, log-probabilities and gradients by autograd in float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    logps = oracle_logps(*leaves, labels, ids, 2 * B, softcap, logit_scale)
    loss = loss_fn(logps[:B], logps[B:], torch.arange(B)).sum()
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return loss, logps, grads


def by_op(op, tensors, labels, ids, B, **options):
    """The same by one of ours."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    hidden, weight, bias = leaves
    if op == "loss":
        loss, chosen, rejected = linear_preference_loss(
            hidden, weight, labels, ids, loss_fn, num_pairs=B, bias=bias, **options
        )
        logps = torch.cat([chosen, rejected])
    else:
        logps = linear_sequence_logprob(hidden, weight, labels, ids, 2 * B, bias=bias, **options)
        loss = loss_fn(logps[:B], logps[B:], torch.arange(B)).sum()
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return loss, logps, grads


def assert_right(op, tensors, labels, ids, B, softcap=None, logit_scale=1.0, **options):
    dtype = tensors[0].dtype
    loss, logps, grads = by_op(op, tensors, labels, ids, B, softcap=softcap, logit_scale=logit_scale, **options)
    expected_loss, expected_logps, expected_grads = oracle(tensors, labels, ids, B, softcap, logit_scale)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(loss.double(), expected_loss, **tolerance)
    torch.testing.assert_close(logps.detach().double(), expected_logps.detach(), **tolerance)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected, **tolerance)
    assert not grads[0][labels == IGNORED].any()


@pytest.fixture(params=["loss", "logprob"])
def op(request):
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
# Everything in one chunk; several pairs a chunk; every pair too long for one.
@pytest.mark.parametrize("tokens", [None, 9, 2])
def test_matches_float64_autograd(op, backend, device, dtype, options, tokens):
    options = dict(options)
    # The interpreter takes a millisecond a row and helper.
    N = 19 if backend == "torch" or device.type == "cuda" else 12
    *tensors, labels, ids = case(dtype, device, N, bias=options.pop("bias", False))
    chunk = None if tokens is None else tokens * 50 * dtype.itemsize
    assert_right(op, tensors, labels, ids, 3, backend=backend, chunk_bytes=chunk, **options)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradcheck_of_log_probabilities(backend, device, softcap):
    hidden, weight, bias, labels, ids = case(torch.float64, device, N=7, D=3, V=5, B=2, bias=True)

    def compute(hidden, weight, bias):
        options = {"bias": bias, "backend": backend, "chunk_bytes": 120, "softcap": softcap}
        return linear_sequence_logprob(hidden, weight, labels, ids, 4, **options)

    # The interpreter takes a second for ten calls: it is checked along a random direction, PyTorch entry by entry.
    tensors = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(compute, tensors, fast_mode=backend == "triton")


def test_gradient_of_the_loss_is_its_difference_quotient(backend, device):
    """By hand: gradcheck runs each backward twice."""
    hidden, weight, bias, labels, ids = case(torch.float64, device, N=7, D=3, V=5, B=2, bias=True)
    _, _, grads = by_op("loss", (hidden, weight, bias), labels, ids, 2, backend=backend, chunk_bytes=120)
    step = 1e-6
    for tensor, grad in zip((hidden, weight, bias), grads, strict=True):
        for index in range(0, tensor.numel(), 4 if backend == "triton" else 1):
            ends = []
            for shift in (step, -2 * step):
                tensor.view(-1)[index] += shift
                loss, *_ = linear_preference_loss(
                    hidden, weight, labels, ids, loss_fn, num_pairs=2, bias=bias, backend=backend
                )
                ends.append(loss.item())
            tensor.view(-1)[index] += step
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(grad.view(-1)[index].item(), abs=1e-7)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(0, 14), D=st.integers(1, 5), V=st.integers(1, 9), B=st.integers(1, 5), tokens=st.integers(1, 15),
    ignored=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_packing(op, backend, device, N, D, V, B, tokens, ignored, seed):
    torch.manual_seed(seed)
    hidden, weight, _, labels, ids = case(torch.float32, device, N, D, V, B)
    labels = torch.where(labels == IGNORED, 0, labels)
    labels[torch.rand(N, device=device) < ignored] = IGNORED
    assert_right(op, (hidden, weight, None), labels, ids, B, backend=backend, chunk_bytes=tokens * V * 4)


def test_only_wanted_gradients_are_computed(op, backend, device):
    hidden, weight, bias, labels, ids = case(torch.float32, device, bias=True)
    _, _, expected = by_op(op, (hidden, weight, bias), labels, ids, 3, backend=backend)
    for wanted in range(3):
        tensors = [hidden.clone(), weight.clone(), bias.clone()]
        tensors[wanted].requires_grad_()
        if op == "loss":
            loss, *_ = linear_preference_loss(
                tensors[0], tensors[1], labels, ids, loss_fn, num_pairs=3, bias=tensors[2], backend=backend
            )
        else:
            logps = linear_sequence_logprob(*tensors[:2], labels, ids, 6, bias=tensors[2], backend=backend)
            loss = loss_fn(logps[:3], logps[3:], torch.arange(3)).sum()
        loss.backward()
        assert torch.equal(tensors[wanted].grad, expected[wanted])
        assert all(t.grad is None for i, t in enumerate(tensors) if i != wanted)


def test_without_gradients_there_is_only_the_loss(backend, device):
    hidden, weight, _, labels, ids = case(torch.float32, device)
    expected, logps, _ = by_op("loss", (hidden, weight, None), labels, ids, 3, backend=backend)
    weight.requires_grad_()
    with torch.no_grad():
        loss, chosen, rejected = linear_preference_loss(
            hidden, weight, labels, ids, loss_fn, num_pairs=3, backend=backend
        )
    assert torch.equal(loss, expected.detach())
    assert torch.equal(torch.cat([chosen, rejected]), logps)
    assert not loss.requires_grad


def test_log_probabilities_carry_no_gradient_and_loss_can_be_scaled(backend, device):
    hidden, weight, _, labels, ids = case(torch.float32, device)
    _, _, (grad_hidden, grad_weight) = by_op("loss", (hidden, weight, None), labels, ids, 3, backend=backend)
    hidden.requires_grad_()
    weight.requires_grad_()
    for _ in range(2):  # accumulated over two micro-batches
        loss, chosen, rejected = linear_preference_loss(
            hidden, weight, labels, ids, loss_fn, num_pairs=3, backend=backend
        )
        assert not chosen.requires_grad
        assert not rejected.requires_grad
        (loss * 0.25).backward()
    torch.testing.assert_close(hidden.grad, grad_hidden / 2)
    torch.testing.assert_close(weight.grad, grad_weight / 2)


def test_tied_weight_gets_both_gradients(backend, device):
    _, weight, _, labels, ids = case(torch.float64, device)
    tokens = torch.randint(50, (19,), device=device)
    tied, apart = (weight.clone().requires_grad_() for _ in range(2))
    linear_preference_loss(F.embedding(tokens, tied), tied, labels, ids, loss_fn, num_pairs=3, backend=backend)[
        0
    ].backward()
    logps = oracle_logps(F.embedding(tokens, apart), apart, None, labels, ids, 6, None, 1.0)
    loss_fn(logps[:3], logps[3:], torch.arange(3)).sum().backward()
    torch.testing.assert_close(tied.grad, apart.grad)


def test_second_backward_and_second_derivative_are_refused(backend, device):
    hidden, weight, _, labels, ids = case(torch.float32, device)
    hidden.requires_grad_()
    loss, *_ = linear_preference_loss(hidden, weight, labels, ids, loss_fn, num_pairs=3, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="there is no second"):
        loss.backward()
    logps = linear_sequence_logprob(hidden, weight, labels, ids, 6, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_same_bits_on_every_run(op, backend, device):
    *tensors, labels, ids = case(torch.float32, device, N=60, V=300)
    first = by_op(op, tensors, labels, ids, 3, backend=backend, chunk_bytes=20_000)
    again = by_op(op, tensors, labels, ids, 3, backend=backend, chunk_bytes=20_000)
    assert torch.equal(first[1], again[1])
    for a, b in zip(first[2], again[2], strict=True):
        assert torch.equal(a, b)


def test_backends_agree(op, device):
    *tensors, labels, ids = case(torch.float32, device, V=300)
    one, other = (by_op(op, tensors, labels, ids, 3, backend=backend) for backend in ("torch", "triton"))
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(one[2], other[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_tensors(op, device):
    *tensors, labels, ids = case(torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        _, logps, grads = by_op(op, tensors, labels, ids, 3)
    halves = [None if t is None else t.bfloat16() for t in tensors]
    expected = by_op(op, halves, labels, ids, 3)
    assert torch.equal(logps, expected[1])
    for grad, other in zip(grads, expected[2], strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, other.float(), rtol=1e-2, atol=1e-4)


def test_a_backward_pass_under_autocast_has_the_bits_of_one_outside(backend, device):
    """Its products choose their own dtypes: rounded once more, a float32 weight's gradient would lose digits."""
    *tensors, labels, ids = case(torch.float32, device, bias=True)
    results = []
    for inside in (True, False):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            sums = linear_sequence_logprob(
                *leaves[:2], labels, ids, 6, bias=leaves[2], backend=backend, chunk_bytes=900
            )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=inside):
            results.append((sums.detach(), *torch.autograd.grad(sums.sum(), leaves)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_float64_weight_under_autocast_is_summed_in_float32(op, device, monkeypatch):
    """GPUs multiply no half precision into float64."""
    totals, product = set(), linear_head.add_weight_product

    def recorded(total, *args):
        totals.add(total.dtype)
        product(total, *args)

    monkeypatch.setattr(linear_head, "add_weight_product", recorded)
    hidden, weight, _, labels, ids = case(torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        _, _, grads = by_op(op, (hidden, weight.double(), None), labels, ids, 3)
        _, _, expected = by_op(op, (hidden, weight, None), labels, ids, 3)
    assert totals == {torch.float32}
    assert grads[1].dtype == torch.float64
    torch.testing.assert_close(grads[1].float(), expected[1])


def test_a_vocabulary_that_leaves_a_rank_without_rows_is_refused_on_every_rank(op, monkeypatch):
    """5 rows make parts of 2 for 4 ranks: the first three would wait for the last, which has none."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    call = (
        partial(linear_preference_loss, loss_fn=lambda c, r, i: c - r, num_pairs=1)
        if op == "loss"
        else partial(linear_sequence_logprob, num_sequences=2)
    )
    for start, end in ((0, 2), (4, 5), (5, 5)):
        with pytest.raises(ValueError, match="the last of 4 ranks would have none of the 5 rows"):
            call(H, W[start:end], L, I, shard=VocabShard(start, 5))


def test_half_precision_gradient_of_the_weight_is_accumulated_in_float32(backend, device):
    """44 contributions of 1 to 256: added one by one in bfloat16 none of them would count."""
    N = 45
    hidden = torch.ones(N, 1, dtype=torch.bfloat16, device=device)
    hidden[0] = 256.0
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    labels, ids = torch.zeros(N, dtype=torch.long, device=device), torch.zeros(N, dtype=torch.long, device=device)
    loss, *_ = linear_preference_loss(
        hidden, weight, labels, ids, lambda c, r, i: 2 * c, num_pairs=1, chunk_bytes=4, backend=backend
    )
    loss.backward()
    assert weight.grad.flatten().tolist() == [300.0, -300.0]


def test_gradient_checkpointing(op, device):
    *tensors, labels, ids = case(torch.float64, device)
    _, _, expected = by_op(op, tensors, labels, ids, 3)
    hidden, weight = (t.clone().requires_grad_() for t in tensors[:2])

    def compute(hidden, weight):
        if op == "loss":
            return linear_preference_loss(hidden, weight, labels, ids, loss_fn, num_pairs=3)[0]
        logps = linear_sequence_logprob(hidden, weight, labels, ids, 6)
        return loss_fn(logps[:3], logps[3:], torch.arange(3)).sum()

    torch.utils.checkpoint.checkpoint(compute, hidden, weight, use_reentrant=False).backward()
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


H, W = torch.randn(4, 3), torch.randn(7, 3)
L, I = torch.tensor([1, 2, IGNORED, 6]), torch.tensor([0, 1, 1, 0])  # noqa: E741


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((H[None], W, L, I), {}, ValueError, "hidden must be packed"),
        ((H, W[:, :2], L, I), {}, ValueError, r"weight must have shape \(V, 3\)"),
        ((H, W[:0], L, I), {}, ValueError, "empty vocabulary"),
        ((H, W.double(), L, I), {}, TypeError, "weight is torch.float64 and hidden torch.float32"),
        ((H.long(), W, L, I), {}, TypeError, "hidden must be float32"),
        ((H, W, L[:2], I), {}, ValueError, "labels must have shape"),
        ((H, W, L.float(), I), {}, TypeError, "labels must be int64"),
        ((H, W, L + 1, I), {}, ValueError, r"labels\[2\] is -99"),
        ((H, W, L, I + 1), {}, ValueError, r"sequence_ids\[1\] is 2, outside \[0, 2\)"),
        ((H, W, L, I[:3]), {}, ValueError, "sequence_ids must have shape"),
        ((H, W.to("meta"), L, I), {}, ValueError, "weight is on meta"),
        ((H, W, L, I), {"bias": torch.zeros(3)}, ValueError, "bias must have shape"),
        ((H, W, L, I), {"bias": torch.zeros(7).half()}, TypeError, "bias is torch.float16"),
        ((H, W, L, I), {"softcap": 0.0}, ValueError, "softcap must be"),
        ((H, W, L, I), {"logit_scale": 0.0}, ValueError, "logit_scale must be"),
        ((H, W, L, I), {"backend": "cuda"}, ValueError, "backend must be"),
        ((H, W, L, I), {"chunk_bytes": 0}, ValueError, "chunk_bytes must be"),
    ],
)
def test_bad_arguments(op, arguments, options, error, message):
    call = (
        partial(linear_preference_loss, *arguments, lambda c, r, i: c - r, num_pairs=1)
        if op == "loss"
        else partial(linear_sequence_logprob, *arguments, 2)
    )
    with pytest.raises(error, match=message):
        call(**options)


@pytest.mark.parametrize("num_pairs", [0, 1.0, True, None])
def test_number_of_pairs_is_checked(num_pairs):
    with pytest.raises(ValueError, match="num_pairs must be an int"):
        linear_preference_loss(H, W, L, I, lambda c, r, i: c - r, num_pairs=num_pairs)


def test_loss_that_mixes_the_pairs_of_a_chunk_is_refused():
    with pytest.raises(ValueError, match="one loss per pair"):
        linear_preference_loss(H, W, L, I, lambda c, r, i: (c - r).mean(), num_pairs=1)


def test_identity_of_a_transform():
    assert LogitTransform().is_identity
    assert not LogitTransform(softcap=30.0).is_identity
