"""`sequence_logprob` on both backends against float64 autograd."""

import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdpo_kernels import sequence_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"))]  # fmt: skip
# Of values of size ~10 and of gradients ≤ 2; half precision rounds the gradient it stores, not the sums.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def oracle(logits, labels, sequence_ids, num_sequences, ignore_index=-100):
    """The same in float64, out of PyTorch's own operations."""
    keep = labels != ignore_index
    logp = logits.double().log_softmax(-1)[keep].gather(1, labels[keep].unsqueeze(1)).squeeze(1)
    return logp.new_zeros(num_sequences).index_add(0, sequence_ids[keep].long(), logp)


def case(N, V, S, dtype, seed=0, ignored=0.25, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(N, V, generator=g) * scale).to(dtype)
    labels = torch.randint(V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < ignored] = -100
    ids = torch.randint(S, (N,), generator=g)
    return logits.to(DEVICE), labels.to(DEVICE), ids.to(DEVICE)


def check(backend, logits, labels, ids, S, inplace=False, weights=None):
    weights = torch.linspace(-2, 1.5, S, device=logits.device) if weights is None else weights
    exact = logits.detach().double().requires_grad_()
    expected = oracle(exact, labels, ids, S)
    (expected * weights.double()).sum().backward()

    leaf = logits.detach().clone().requires_grad_()
    # Times one: logits that are nobody's own tensor, as an LM head's are.
    result = sequence_logprob(
        leaf * 1.0 if inplace else leaf, labels, ids, S, backend=backend, inplace_backward=inplace
    )
    (result * weights).sum().backward()
    tolerance = TOLERANCE[logits.dtype]
    accumulated = TOLERANCE[torch.float64 if logits.dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(result.double(), expected.detach(), rtol=accumulated, atol=accumulated * 10)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
    assert result.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert not leaf.grad[labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 7, 1000, 32000, 151936])
def test_forward_and_gradient(backend, V, dtype):
    N = 12 if V <= 1000 else 3
    check(backend, *case(N, V, 3, dtype), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [7, 9001])
def test_gradient_in_place(backend, V, dtype):
    check(backend, *case(6, V, 2, dtype), 2, inplace=True)


def test_in_place_gradient_uses_the_logits_memory(backend):
    leaf = torch.randn(4, 50, device=DEVICE, requires_grad=True)
    logits = leaf * 1.0
    pointers = []
    logits.register_hook(lambda grad: pointers.append(grad.data_ptr()))
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    result = sequence_logprob(logits, ids, ids, 1, backend=backend, inplace_backward=True)
    result.sum().backward(retain_graph=True)
    assert pointers == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="overwritten"):
        result.sum().backward()


def test_gradcheck(backend):
    logits, labels, ids = case(5, 6, 3, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_logprob(x, labels, ids, 3, backend=backend), (logits,))


def test_second_derivative_is_refused(backend):
    logits, labels, ids = case(3, 5, 1, torch.float32)
    logits.requires_grad_()
    result = sequence_logprob(logits, labels, ids, 1, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(result.sum(), logits, create_graph=True)


def test_sequences_with_nothing_to_count_are_zero(backend):
    logits, _, ids = case(4, 11, 2, torch.float32)
    logits.requires_grad_()
    labels = torch.full((4,), -100, device=DEVICE)
    result = sequence_logprob(logits, labels, ids, 5, backend=backend)
    assert torch.equal(result, torch.zeros(5, device=DEVICE))
    result.sum().backward()
    assert not logits.grad.any()


def test_one_token_and_none(backend):
    logits, _, _ = case(1, 9, 1, torch.float32)
    label = torch.tensor([4], device=DEVICE)
    result = sequence_logprob(logits, label, torch.zeros_like(label), 1, backend=backend)
    torch.testing.assert_close(result, logits.log_softmax(-1)[:, 4])
    empty = sequence_logprob(logits[:0], label[:0], label[:0], 2, backend=backend)
    assert torch.equal(empty, torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize("view", ["transposed", "sliced", "strided"])
def test_any_strides(backend, view):
    base = torch.randn(2, 40, 24, device=DEVICE)
    logits = {"transposed": base[0].t(), "sliced": base[0, 3:31, 2:21], "strided": base[1, ::3, ::2]}[view]
    assert not logits.is_contiguous()
    labels = torch.randint(logits.shape[1], logits.shape[:1], device=DEVICE)
    ids = torch.arange(len(labels), device=DEVICE) % 3
    leaf = base.clone().requires_grad_()
    mine = leaf.as_strided(logits.shape, logits.stride(), logits.storage_offset())
    sequence_logprob(mine, labels, ids, 3, backend=backend).sum().backward()
    exact = base.double().requires_grad_()
    oracle(exact.as_strided(logits.shape, logits.stride(), logits.storage_offset()), labels, ids, 3).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_padded_form_is_packed_form(backend, inplace):
    base = torch.randn(3, 6, 13, device=DEVICE)
    labels = torch.randint(13, (3, 5), device=DEVICE)
    labels[1, 2:] = -100
    leaf = base.clone().requires_grad_()
    # The usual shift: a view that has no two-dimensional form without a copy.
    padded = sequence_logprob((leaf * 1.0)[:, :-1], labels, backend=backend, inplace_backward=inplace)
    padded.backward(torch.tensor([1.0, -2.0, 0.5], device=DEVICE))
    exact = base.double().requires_grad_()
    ids = torch.arange(3, device=DEVICE).repeat_interleave(5)
    expected = oracle(exact[:, :-1].reshape(15, 13), labels.flatten(), ids, 3)
    expected.backward(torch.tensor([1.0, -2.0, 0.5], device=DEVICE).double())
    torch.testing.assert_close(padded.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits(backend, dtype):
    logits, labels, ids = case(6, 300, 2, dtype, ignored=0.0)
    logits = logits.sign() * 1e4
    check(backend, logits.to(dtype), labels, ids, 2)


def test_minus_infinity_off_the_label(backend):
    logits, labels, ids = case(6, 20000, 2, torch.float32, ignored=0.0)
    logits[:, :9000] = float("-inf")  # more than a whole block at the front
    logits[2, 15000:] = float("-inf")
    labels = labels % 5000 + 9000
    result = sequence_logprob(logits.requires_grad_(), labels, ids, 2, backend=backend)
    torch.testing.assert_close(result.double(), oracle(logits, labels, ids, 2).detach(), rtol=1e-6, atol=1e-4)
    result.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, :9000].any()


def test_nan_is_not_hidden(backend):
    logits, labels, ids = case(4, 30, 2, torch.float32, ignored=0.0)
    ids = torch.tensor([0, 0, 1, 1], device=DEVICE)
    logits[1, (labels[1] + 1) % 30] = float("nan")
    result = sequence_logprob(logits, labels, ids, 2, backend=backend)
    assert result.isnan().tolist() == [True, False]


def test_same_bits_every_time(backend):
    logits, labels, ids = case(64, 500, 5, torch.float32)

    def once():
        leaf = logits.clone().requires_grad_()
        result = sequence_logprob(leaf, labels, ids, 5, backend=backend)
        result.sum().backward()
        return result, leaf.grad

    (a, grad_a), (b, grad_b) = once(), once()
    assert torch.equal(a, b)
    assert torch.equal(grad_a, grad_b)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(N=st.integers(1, 9), V=st.integers(1, 40), S=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_any_packing(backend, N, V, S, seed):
    check(backend, *case(N, V, S, torch.float32, seed=seed), S)


def test_sum_does_not_depend_on_the_packing_order(backend):
    logits, labels, ids = case(30, 17, 4, torch.float32)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    a = sequence_logprob(logits, labels, ids, 4, backend=backend)
    b = sequence_logprob(logits[order], labels[order], ids[order], 4, backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_bad_arguments_are_named(backend):
    logits, labels, ids = case(4, 8, 2, torch.float32, ignored=0.0)
    ones = torch.ones(4, device=DEVICE)

    def call(error, match, logits=logits, labels=labels, ids=ids, S=2, **options):
        with pytest.raises(error, match=match):
            sequence_logprob(logits, labels, ids, S, backend=backend, **options)

    call(ValueError, r"labels must be in \[0, 8\).*got 8 at flat index 3", labels=torch.tensor([0, 1, 2, 8]).to(DEVICE))
    call(ValueError, r"labels must be in.*got -1 at flat index 0", labels=torch.full((4,), -1, device=DEVICE))
    call(ValueError, r"sequence_ids must be in \[0, 2\)", ids=torch.full((4,), 2, device=DEVICE))
    call(TypeError, "logits must be float32", logits=logits.long())
    call(TypeError, "labels must be int64", labels=ones)
    call(TypeError, "sequence_ids must be int64", ids=ones)
    call(TypeError, "logits must be a tensor", logits=[1.0])
    call(TypeError, "num_sequences must be an int", S=2.0)
    call(ValueError, "num_sequences must be at least 1", S=0)
    call(ValueError, r"logits must be \(N, V\)", logits=logits[0])
    call(ValueError, "empty vocabulary", logits=logits[:, :0])
    call(ValueError, "labels must have the shape", labels=labels[:3])
    call(ValueError, r"sequence_ids must be \(N,\)", ids=ids[:3])
    call(ValueError, "need sequence_ids", ids=None)
    call(ValueError, "belong to packed", logits=logits[None], labels=labels[None])
    call(ValueError, "leaf", logits=logits.clone().requires_grad_(), inplace_backward=True)
    call(ValueError, "expanded", logits=(logits[:1].clone().requires_grad_() * 1).expand(4, 8), inplace_backward=True)
    call(ValueError, "labels is on meta", labels=labels.to("meta"))
    with pytest.raises(ValueError, match="backend must be"):
        sequence_logprob(logits, labels, ids, 2, backend="cuda")


def test_triton_on_a_cpu_needs_the_interpreter(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, labels, ids = (x.cpu() for x in case(2, 4, 1, torch.float32))
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        sequence_logprob(logits, labels, ids, 1, backend="triton")
    assert sequence_logprob(logits, labels, ids, 1).shape == (1,)
