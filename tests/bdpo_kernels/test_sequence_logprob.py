"""sequence_logprob against float64 autograd, on both backends."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdpo_kernels import sequence_logprob

IGNORED = -100
# Sums of up to four tokens; a gradient is off by at most its own rounding to the logits' dtype (Triton's interpreter
# truncates to bfloat16 where a GPU rounds).
TOLERANCES = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 1e-3, "rtol": 1e-3},
    torch.bfloat16: {"atol": 1e-4, "rtol": 1e-2},
}
DTYPES = list(TOLERANCES)
# One, fewer than a block, more, and vocabularies that are no multiple of it.
VOCABULARIES = [1, 7, 1000, 32000, 151936, 262144]


def oracle(logits, labels, sequence_ids, num_sequences, weights):
    """Sums and the gradient of (weights · sums) by autograd in float64."""
    x = logits.detach().double().requires_grad_()
    kept = labels != IGNORED
    logps = torch.log_softmax(x, -1).gather(-1, labels.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    sums = x.new_zeros(num_sequences).index_add(0, sequence_ids, torch.where(kept, logps, 0.0))
    (grad,) = torch.autograd.grad((sums * weights.double()).sum(), x)
    return sums, grad


def packed(V, dtype, device, N=5, S=4):
    """N tokens of S − 1 sequences out of order, one token ignored, and one sequence with none."""
    logits = (3 * torch.randn(N, V, device=device)).to(dtype)
    labels = torch.randint(0, V, (N,), device=device)
    labels[1] = IGNORED
    sequence_ids = torch.tensor([1, 0, 2, 1, 0, 2, 2, 1][:N], device=device)
    return logits, labels, sequence_ids, S, torch.tensor([1.0, -0.5, 2.0, 3.0], device=device)[:S]


def run(logits, labels, sequence_ids, S, weights, **options):
    """Ours: sums and the gradient of (weights · sums)."""
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    sums = sequence_logprob(x, labels, sequence_ids, S, **options)
    (grad,) = torch.autograd.grad((sums * weights.to(sums.dtype)).sum(), x)
    return sums, grad


def assert_right(case, dtype, **options):
    sums, grad = run(*case, **options)
    expected_sums, expected_grad = oracle(*case)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    sum_tolerance = TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(sums.double(), expected_sums, **sum_tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_matches_float64_autograd(backend, device, V, dtype):
    assert_right(packed(V, dtype, device, N=3 if V > 100_000 else 5), dtype, backend=backend)


def test_gradcheck(backend, device):
    _, labels, ids, S, _ = packed(7, torch.float64, device)
    logits = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    # Along a random direction by the kernels, whose interpreter is slow, and entry by entry by PyTorch.
    fast = backend == "triton"
    assert torch.autograd.gradcheck(
        lambda x: sequence_logprob(x, labels, ids, S, backend=backend), logits, fast_mode=fast
    )


def test_ignored_tokens_get_exactly_zero_and_are_never_read(backend, device):
    logits, labels, ids, S, weights = packed(1000, torch.float32, device)
    logits[1] = float("nan")
    sums, grad = run(logits, labels, ids, S, weights, backend=backend)
    assert torch.isfinite(sums).all()
    assert torch.isfinite(grad).all()
    assert (grad[1] == 0).all()


def test_sequence_with_all_labels_ignored_is_zero(backend, device):
    logits, labels, ids, S, weights = packed(1000, torch.float32, device)
    labels[ids == 2] = IGNORED
    sums, grad = run(logits, labels, ids, S, weights, backend=backend)
    assert sums[2] == 0
    assert (grad[ids == 2] == 0).all()
    sums, grad = run(logits, torch.full_like(labels, IGNORED), ids, S, weights, backend=backend)
    assert (sums == 0).all()
    assert (grad == 0).all()


def test_one_token(backend, device):
    logits = torch.randn(1, 1000, device=device)
    label = torch.tensor([3], device=device)
    assert_right(
        (logits, label, torch.zeros(1, dtype=torch.long, device=device), 1, torch.ones(1, device=device)),
        torch.float32,
        backend=backend,
    )


def test_no_token(backend, device):
    logits = torch.randn(0, 7, device=device, requires_grad=True)
    none = torch.empty(0, dtype=torch.long, device=device)
    sums = sequence_logprob(logits, none, none, 3, backend=backend)
    sums.sum().backward()
    assert sums.tolist() == [0.0, 0.0, 0.0]
    assert logits.grad.shape == (0, 7)


def test_padded_is_a_view_of_packed(backend, device):
    B, T, V = 3, 4, 1000
    logits = torch.randn(B, T + 1, V, device=device)
    labels = torch.randint(0, V, (B, T), device=device)
    labels[0, 2:] = IGNORED
    labels[2] = IGNORED
    weights = torch.tensor([1.0, -2.0, 3.0], device=device)
    sums, grad = run(logits[:, :-1], labels, None, None, weights, backend=backend)
    ids = torch.arange(B, device=device).repeat_interleave(T)
    flat = run(logits[:, :-1].reshape(B * T, V), labels.flatten(), ids, B, weights, backend=backend)
    torch.testing.assert_close(sums, flat[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.flatten(0, 1), flat[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["rows", "columns", "slice", "padded"])
def test_non_contiguous_logits(backend, device, layout):
    _, labels, ids, S, weights = packed(1000, torch.float32, device)
    if layout == "rows":
        view = torch.randn(10, 1000, device=device)[::2]
    elif layout == "columns":
        view = torch.randn(1000, 5, device=device).t()
    elif layout == "slice":
        view = torch.randn(5, 1203, device=device)[:, 100:1100]
    else:
        view = torch.randn(5, 3, 1000, device=device)[:, 1]
    assert not view.is_contiguous()
    base = view.detach().requires_grad_()
    sums = sequence_logprob(base, labels, ids, S, backend=backend)
    expected_sums, expected_grad = oracle(view, labels, ids, S, weights)
    (grad,) = torch.autograd.grad((sums * weights).sum(), base)
    torch.testing.assert_close(sums.double(), expected_sums, **TOLERANCES[torch.float32])
    torch.testing.assert_close(grad.double(), expected_grad, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("view", ["transposed", "sliced", "strided"])
def test_gradient_through_a_view(backend, device, view):
    base = torch.randn(2, 40, 24, device=device)
    logits = {"transposed": base[0].t(), "sliced": base[0, 3:31, 2:21], "strided": base[1, ::3, ::2]}[view]
    assert not logits.is_contiguous()
    where = logits.shape, logits.stride(), logits.storage_offset()
    labels = torch.randint(logits.shape[1], logits.shape[:1], device=device)
    ids = torch.arange(len(labels), device=device) % 3
    leaf = base.clone().requires_grad_()
    sequence_logprob(leaf.as_strided(*where), labels, ids, 3, backend=backend).sum().backward()
    _, expected = oracle(logits, labels, ids, 3, torch.ones(3, device=device))
    torch.testing.assert_close(leaf.grad.as_strided(*where).double(), expected, **TOLERANCES[torch.float32])
    assert torch.count_nonzero(leaf.grad) == torch.count_nonzero(leaf.grad.as_strided(*where))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(N=st.integers(1, 9), V=st.integers(1, 40), S=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_any_packing(backend, device, N, V, S, seed):
    torch.manual_seed(seed)
    labels = torch.randint(V, (N,), device=device)
    labels[torch.rand(N, device=device) < 0.25] = IGNORED
    ids = torch.randint(S, (N,), device=device)
    assert_right(
        (3 * torch.randn(N, V, device=device), labels, ids, S, torch.linspace(-2, 1.5, S, device=device)),
        torch.float32,
        backend=backend,
    )


def test_non_contiguous_labels_and_int32(backend, device):
    logits, labels, ids, S, weights = packed(1000, torch.float32, device)
    strided = torch.stack([labels, labels], dim=1)[:, 0]
    expected = run(logits, labels, ids, S, weights, backend=backend)
    for other_labels, other_ids in ((strided, ids), (labels.int(), ids.int())):
        sums, grad = run(logits, other_labels, other_ids, S, weights, backend=backend)
        assert torch.equal(sums, expected[0])
        assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(backend, device, offset, dtype):
    logits, *rest = packed(1000, torch.float32, device)
    case = ((logits + offset).to(dtype), *rest)
    assert_right(case, dtype, backend=backend)


def test_logits_from_minus_to_plus_ten_thousand(backend, device):
    logits, labels, *rest = packed(1000, torch.float32, device)
    logits = torch.linspace(-1e4, 1e4, 1000, device=device).expand(5, 1000)[:, torch.randperm(1000)]
    labels = torch.where(labels == IGNORED, labels, logits.argmax(-1))
    labels[0] = (labels[0] + 1) % 1000
    assert_right((logits, labels, *rest), torch.float32, backend=backend)


def test_minus_infinity_off_the_label(backend, device):
    """Single logits, and a whole leading block of Triton's (16 KiB)."""
    logits, labels, ids, S, weights = packed(10_000, torch.float32, device)
    logits[:, :9000] = -float("inf")
    logits[0] = torch.where(torch.rand(10_000, device=device) < 0.5, -float("inf"), logits[0])
    labels = torch.where(labels == IGNORED, labels, 9500)
    logits[:, 9500] = 1.0
    assert_right((logits, labels, ids, S, weights), torch.float32, backend=backend)


def test_minus_infinity_on_the_label_costs_infinitely(backend, device):
    logits, labels, ids, S, weights = packed(1000, torch.float32, device)
    logits[0, labels[0]] = -float("inf")
    sums, grad = run(logits, labels, ids, S, weights, backend=backend)
    assert sums[1] == -float("inf")
    assert torch.isfinite(sums[[0, 2, 3]]).all()
    assert torch.isfinite(grad).all()


def test_nan_stays_in_its_sequence(backend, device):
    logits, labels, ids, S, weights = packed(1000, torch.float32, device)
    logits[0, 17] = float("nan")
    sums, _ = run(logits, labels, ids, S, weights, backend=backend)
    assert sums.isnan().tolist() == [False, True, False, False]


def test_same_bits_on_every_run_and_in_any_order(backend, device):
    logits, labels, ids, S, weights = packed(1000, torch.float32, device)
    first = run(logits, labels, ids, S, weights, backend=backend)
    again = run(logits, labels, ids, S, weights, backend=backend)
    order = torch.randperm(5, device=device)
    mixed = run(logits[order], labels[order], ids[order], S, weights, backend=backend)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[0], mixed[0])
    assert torch.equal(first[1][order], mixed[1])


def test_backends_agree(device):
    case = packed(1000, torch.float32, device)
    one, other = run(*case, backend="torch"), run(*case, backend="triton")
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)


def test_second_derivative_is_refused(backend, device):
    logits, labels, ids, S, _ = packed(7, torch.float32, device)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        sequence_logprob(logits, labels, ids, S, backend=backend).sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


LOGITS, LABELS, IDS = torch.randn(3, 7), torch.tensor([1, 2, IGNORED]), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (LOGITS, torch.tensor([1, 7, 2]), IDS, 2),
            {},
            ValueError,
            r"labels\[1\] is 7.*vocabulary \[0, 7\).*tokenizer",
        ),
        ((LOGITS, torch.tensor([1, -1, 2]), IDS, 2), {}, ValueError, r"labels\[1\] is -1"),
        ((LOGITS, LABELS, torch.tensor([0, 1, 2]), 2), {}, ValueError, r"sequence_ids\[2\] is 2, outside \[0, 2\)"),
        ((LOGITS, LABELS, torch.tensor([0, -1, 1]), 2), {}, ValueError, r"sequence_ids\[1\] is -1"),
        ((LOGITS, LABELS), {}, ValueError, "needs sequence_ids"),
        ((LOGITS, LABELS, IDS[:2], 2), {}, ValueError, "sequence_ids must have shape"),
        ((LOGITS, LABELS, IDS, -1), {}, ValueError, "num_sequences must be"),
        ((LOGITS, LABELS, IDS, 2.0), {}, TypeError, "num_sequences must be an int"),
        ((LOGITS[None], LABELS[None], IDS, 2), {}, ValueError, "omit it"),
        ((LOGITS[None], LABELS[None], None, 2), {}, ValueError, "B = 1"),
        ((LOGITS, LABELS[:2], IDS, 2), {}, ValueError, "labels must have shape"),
        ((LOGITS[0], LABELS, IDS, 2), {}, ValueError, "packed .N, V. or padded"),
        ((LOGITS[:, :0], LABELS, IDS, 2), {}, ValueError, "empty vocabulary"),
        ((LOGITS.long(), LABELS, IDS, 2), {}, TypeError, "logits must be float32"),
        ((LOGITS, LABELS.float(), IDS, 2), {}, TypeError, r"labels must be int64.*labels.long"),
        ((LOGITS, LABELS, IDS.float(), 2), {}, TypeError, "sequence_ids must be int64"),
        ((LOGITS, LABELS.tolist(), IDS, 2), {}, TypeError, "labels must be a torch.Tensor"),
        ((LOGITS, LABELS.to("meta"), IDS, 2), {}, ValueError, "labels is on meta"),
        ((LOGITS, LABELS, IDS, 2), {"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sequence_logprob(*arguments, **options)


def test_unchecked_label_out_of_range_is_nan_in_triton(device):
    labels = torch.tensor([1, 7, 2], device=device)
    sums = sequence_logprob(LOGITS.to(device), labels, IDS.to(device), 2, backend="triton", check_labels=False)
    assert sums.isnan().tolist() == [False, True]


def test_triton_on_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    rows = pytest.importorskip("bdpo_kernels.rows.triton")
    monkeypatch.setattr(rows, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        sequence_logprob(LOGITS, LABELS, IDS, 2, backend="triton")
