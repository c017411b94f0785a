"""Defects that users of other kernels have found, each tried here on both backends: half precision and odd shapes.

The oracle is float64 autograd on the same, already rounded inputs.
"""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from counting import recorded_launches

from bdpo_kernels import linear_preference_loss, linear_sequence_logprob, sequence_logprob

pytestmark = pytest.mark.usefixtures("on_device")
HALF = torch.bfloat16


def oracle(hidden, weight, labels, bias=None, softcap=None):
    """Leaves in float64, and each token's log-probability."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    x = F.linear(*leaves)
    u = softcap * torch.tanh(x / softcap) if softcap else x
    return leaves, u.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def leaves_of(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def with_logits_up_to(peak, N=500, V=600, D=64, dtype=HALF):
    """Hidden states and a weight whose products reach |logit| = `peak`, labels among the likelier ones."""
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    weight *= peak / (hidden @ weight.t()).abs().max()
    logits = hidden.to(dtype).float() @ weight.to(dtype).float().t()
    return hidden.to(dtype), weight.to(dtype), torch.multinomial(logits.softmax(-1), 1).squeeze(1)


@pytest.mark.parametrize("peak", [5, 20, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_probability_of_500_tokens_is_right_to_a_thousandth_of_a_nat(backend, device, peak, dtype):
    """Rounding logits to bfloat16 puts it off by tenths: TRL and Liger do; a fix went into Unsloth."""
    # The interpreter is slow: a fifth of the tokens, and of the error that they may add up to.
    N, most = (100, 2e-4) if backend == "triton" else (500, 1e-3)
    hidden, weight, labels = with_logits_up_to(peak, N, dtype=dtype)
    ids = torch.zeros(N, dtype=torch.long)
    _, logps = oracle(hidden, weight, labels)
    expected = logps.sum().item()
    options = {"backend": backend, "chunk_bytes": 125 * 608 * 4}
    found = linear_sequence_logprob(hidden, weight, labels, ids, 1, **options).item()
    assert abs(found - expected) <= most
    leaf = hidden.clone().requires_grad_()
    _, chosen, _ = linear_preference_loss(leaf, weight, labels, ids, lambda c, r, i: r - c, num_pairs=1, **options)
    assert abs(chosen.item() - expected) <= most


def test_logits_in_half_precision_are_an_option_with_the_error_that_it_has(backend, device):
    hidden, weight, labels = with_logits_up_to(80, N=40)
    ids = torch.zeros(40, dtype=torch.long)
    expected = oracle(hidden, weight, labels)[1].sum().item()
    options = {"backend": backend, "exact": False}
    found = linear_sequence_logprob(hidden, weight, labels, ids, 1, **options)
    assert 1e-3 < abs(found.item() - expected) < 10
    leaves = leaves_of(hidden, weight)
    loss, chosen, _ = linear_preference_loss(*leaves, labels, ids, lambda c, r, i: r - c, num_pairs=1, **options)
    loss.backward()
    assert chosen.item() == pytest.approx(found.item(), abs=1e-3)
    (h, w, _), logps = oracle(hidden, weight, labels)
    grads = torch.autograd.grad(-logps.sum(), (h, w))
    assert relative(leaves[1].grad, grads[1]) < 0.05


@pytest.mark.parametrize("op", ["loss", "logprob"])
def test_gradient_of_a_confident_token_is_right_to_one_percent(backend, device, op):
    """1 − p rounded in a bfloat16 buffer is off by all of itself at p = 0.999 (Liger #1329)."""
    V, D = 40, 16
    weight = torch.randn(V, D).to(HALF)
    found_p = []
    for p in (0.9, 0.99, 0.999, 0.9999):
        low, high = 0.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            hidden = (middle * weight[3].float() / weight[3].float().norm())[None].to(HALF)
            reached = oracle(hidden, weight, torch.tensor([3]))[1].exp().item()
            low, high = (middle, high) if reached < p else (low, middle)
        labels, ids = torch.tensor([3]), torch.tensor([0])
        (h, w, _), logps = oracle(hidden, weight, labels)
        found_p.append(logps.exp().item())
        expected = torch.autograd.grad(-0.37 * logps.sum(), (h, w))
        leaves = leaves_of(hidden, weight)
        if op == "loss":
            loss, *_ = linear_preference_loss(
                *leaves, labels, ids, lambda c, r, i: -0.37 * c, num_pairs=1, backend=backend
            )
        else:
            loss = -0.37 * linear_sequence_logprob(*leaves, labels, ids, 1, backend=backend).sum()
        loss.backward()
        for leaf, right in zip(leaves, expected, strict=True):
            assert relative(leaf.grad, right) <= 1e-2, p
        assert relative(leaves[1].grad[3], expected[1][3]) <= 1e-2, p
    assert found_p[0] < 0.92
    assert found_p[-1] > 0.9995


def test_weights_gradient_is_the_same_in_1_and_in_1000_chunks(device):
    """Added up in bfloat16 its error grows sevenfold with the chunks (Liger #512, #830, #1391)."""
    N, D, V, B = 1000, 16, 50, 500
    hidden, weight = torch.randn(N, D).to(HALF), torch.randn(V, D).to(HALF)
    labels, ids = torch.randint(V, (N,)), torch.arange(N) // 2 + torch.arange(N) % 2 * B
    ids = ids % (2 * B)
    (_, w, _), logps = oracle(hidden, weight, labels)
    (expected,) = torch.autograd.grad(-logps.sum(), (w,))
    errors = []
    for chunk_bytes in (None, V * 4):
        leaves = leaves_of(hidden, weight)
        loss, *_ = linear_preference_loss(
            *leaves, labels, ids, lambda c, r, i: -(c + r), num_pairs=B, chunk_bytes=chunk_bytes
        )
        loss.backward()
        errors.append(relative(leaves[1].grad, expected))
    assert max(errors) < 3e-3
    assert errors[1] < 1.1 * errors[0]


def test_weights_gradient_in_chunks_through_the_kernels(backend, device):
    hidden, weight = torch.randn(30, 16).to(HALF), torch.randn(50, 16).to(HALF)
    labels, ids = torch.randint(50, (30,)), torch.zeros(30, dtype=torch.long)
    (_, w, _), logps = oracle(hidden, weight, labels)
    (expected,) = torch.autograd.grad(-logps.sum(), (w,))
    for chunk_bytes in (None, 1):
        leaves = leaves_of(hidden, weight)
        loss, *_ = linear_preference_loss(
            *leaves, labels, ids, lambda c, r, i: -c, num_pairs=1, chunk_bytes=chunk_bytes, backend=backend
        )
        loss.backward()
        assert relative(leaves[1].grad, expected) < 1e-2


def test_loss_that_weighs_one_pair_0_and_one_3(backend, device):
    """Per-pair factors that were applied to a mean gave wrong gradients (Liger #968)."""
    hidden, weight = torch.randn(12, 8), torch.randn(20, 8)
    labels, ids = torch.randint(20, (12,)), torch.arange(12) % 4
    weights = torch.tensor([0.0, 3.0])
    (h, w, _), logps = oracle(hidden, weight, labels)
    sums = logps.new_zeros(4).index_add(0, ids, logps)
    expected = torch.autograd.grad(-(weights * F.logsigmoid(sums[:2] - sums[2:])).sum(), (h, w))
    for chunk_bytes in (None, 6 * 20 * 4):
        leaves = leaves_of(hidden, weight)
        loss, *_ = linear_preference_loss(
            *leaves, labels, ids, lambda c, r, i: -weights[i] * F.logsigmoid(c - r), num_pairs=2, backend=backend,
            chunk_bytes=chunk_bytes,
        )  # fmt: skip
        loss.backward()
        for leaf, right in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad.double(), right, rtol=1e-5, atol=1e-6)
        assert not leaves[0].grad[ids % 2 == 0].any()


# Multiples of neither 8 nor a block, as embeddings with a few tokens added have; a prime.
@pytest.mark.parametrize(("N", "V"), [(1, 151_665), (7, 129_920), (513, 521), (7, 50_257)])
def test_any_numbers_of_tokens_and_of_vocabulary(backend, device, N, V):
    """QuACK wants multiples of 8, verl gave wrong sums for a vocabulary that is none of 256."""
    if backend == "triton" and N > 100:
        N = 33
    hidden, weight = torch.randn(N, 4), torch.randn(V, 4)
    labels, ids = torch.randint(V, (N,)), torch.zeros(N, dtype=torch.long)
    labels[0] = V - 1
    (h, w, _), logps = oracle(hidden, weight, labels)
    expected = torch.autograd.grad(-logps.sum(), (h, w))
    leaves = leaves_of(hidden, weight)
    loss, *_ = linear_preference_loss(*leaves, labels, ids, lambda c, r, i: -c, num_pairs=1, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.double(), -logps.sum(), rtol=1e-5, atol=1e-5)
    for leaf, right in zip(leaves, expected, strict=True):
        # A float32 product over 150,000 columns: plain PyTorch is off by as much.
        torch.testing.assert_close(leaf.grad.double(), right, rtol=1e-4, atol=1e-3 if V > 10_000 else 1e-5)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("op", ["loss", "logprob"])
def test_a_large_common_offset_costs_no_digits(backend, device, offset, op):
    """Maximum and logarithm added up to one number lose the logarithm (torch's own linear_cross_entropy, in review)."""
    # Eighths: sums of these with the offset are exact in float32.
    hidden = torch.randint(-4, 5, (6, 8)) / 4
    weight = torch.randint(-8, 9, (30, 8)) / 4
    bias = torch.full((30,), offset)
    labels, ids = torch.randint(30, (6,)), torch.zeros(6, dtype=torch.long)
    leaves = leaves_of(hidden, weight, bias)
    right, logps = oracle(hidden, weight, labels, bias)
    expected = torch.autograd.grad(-logps.sum(), right)
    if op == "loss":
        loss, *_ = linear_preference_loss(
            *leaves[:2], labels, ids, lambda c, r, i: -c, num_pairs=1, bias=leaves[2], backend=backend
        )
    else:
        loss = -linear_sequence_logprob(*leaves[:2], labels, ids, 1, bias=leaves[2], backend=backend).sum()
    loss.backward()
    torch.testing.assert_close(loss.double(), -logps.sum(), rtol=1e-5, atol=1e-5)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_bias_with_whatever_else_is_frozen(backend, device, frozen, dtype):
    """The classifier's gradient and the bias path were off in cut-cross-entropy (#14, #52)."""
    tensors = dict(zip(("hidden", "weight", "bias"), (torch.randn(9, 8), torch.randn(20, 8), torch.randn(20))))  # noqa: B905
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    labels, ids = torch.randint(20, (9,)), torch.arange(9) % 2
    right, logps = oracle(tensors["hidden"], tensors["weight"], labels, tensors["bias"])
    expected = dict(zip(tensors, torch.autograd.grad(-logps.sum(), right), strict=True))
    leaves = {name: tensor.clone().requires_grad_(name not in frozen) for name, tensor in tensors.items()}
    loss, *_ = linear_preference_loss(
        leaves["hidden"], leaves["weight"], labels, ids, lambda c, r, i: -(c + r), num_pairs=1, bias=leaves["bias"],
        backend=backend,
    )  # fmt: skip
    loss.backward()
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert relative(leaf.grad, expected[name]) < (1e-2 if dtype == HALF else 1e-5)


@pytest.mark.parametrize("V", [3, 97, 1009])
def test_probabilities_add_up_to_one_and_none_is_above(backend, device, V):
    """verl's kernel gave log-probabilities above 0 (#2656)."""
    V = min(V, 97) if backend == "triton" else V
    hidden = torch.randn(1, 8, dtype=HALF).expand(V, 8).contiguous()
    weight = (3 * torch.randn(V, 8)).to(HALF)
    logps = linear_sequence_logprob(hidden, weight, torch.arange(V), torch.arange(V), V, backend=backend)
    assert (logps <= 0).all()
    assert abs(logps.double().logsumexp(0).item()) < 2e-6


@pytest.mark.parametrize("V", [100, 1003])
def test_soft_cap_does_not_count_what_is_beyond_the_row(backend, device, V):
    """Masked before the cap, each lane beyond the row counts as e^(−cap): all there is, if every logit is there."""
    cap = 2.0
    hidden, weight = torch.ones(2, 4), torch.full((V, 4), -1e3)
    labels, ids = torch.tensor([0, V - 1]), torch.tensor([0, 1])
    leaves = leaves_of(hidden, weight)
    loss, chosen, rejected = linear_preference_loss(
        *leaves, labels, ids, lambda c, r, i: -(c + r), num_pairs=1, softcap=cap, backend=backend
    )
    torch.testing.assert_close(torch.cat([chosen, rejected]), torch.full((2,), -math.log(V)), rtol=1e-6, atol=1e-6)
    loss.backward()
    assert not leaves[1].grad.any()


def test_a_pair_in_two_parts_has_the_bits_of_a_whole_one(backend, device):
    """Its logits are computed twice: both must round alike (marin #8217). Quarters: sums in any order are exact."""
    N, V = 24, 60
    hidden, weight = torch.randint(-4, 5, (N, 8)).to(HALF) / 4, torch.randint(-4, 5, (V, 8)).to(HALF) / 4
    labels, ids = torch.randint(V, (N,)), torch.arange(N) % 2
    results = []
    for tokens in (None, 12, 5):
        leaves = leaves_of(hidden, weight)
        loss, chosen, rejected = linear_preference_loss(
            *leaves, labels, ids, lambda c, r, i: -F.logsigmoid(0.1 * (c - r)), num_pairs=1, backend=backend,
            chunk_bytes=None if tokens is None else tokens * 64 * 4,
        )  # fmt: skip
        loss.backward()
        results.append((loss, chosen, rejected, leaves[0].grad, leaves[1].grad))
    for other in results[1:]:
        for whole, in_parts in zip(results[0][:3], other[:3], strict=True):
            assert torch.equal(whole, in_parts)
        torch.testing.assert_close(results[0][3], other[3], rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(results[0][4], other[4], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scale", [0.1, -0.3])
def test_a_scale_that_float32_does_not_hold_is_right_in_float64(backend, device, scale):
    """Triton passes Python floats as float32: a scale of 0.1 would be off in the eighth digit."""
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64) for n in (5, 30))
    labels, ids = torch.randint(30, (5,)), torch.arange(5) % 2
    for softcap in (None, 0.7):
        (h, w, _), _ = oracle(hidden, weight, labels)
        x = F.linear(h, w)
        u = scale * (softcap * torch.tanh(x / softcap) if softcap else x)
        logps = u.log_softmax(-1).gather(1, labels[:, None]).sum()
        expected = torch.autograd.grad(-logps, (h, w))
        leaves = leaves_of(hidden, weight)
        loss, *_ = linear_preference_loss(
            *leaves, labels, ids, lambda c, r, i: -(c + r), num_pairs=1, softcap=softcap, logit_scale=scale,
            backend=backend,
        )  # fmt: skip
        loss.backward()
        torch.testing.assert_close(loss, -logps, rtol=1e-13, atol=1e-13)
        for leaf, right in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, right, rtol=1e-11, atol=1e-12)


def test_nothing_is_made_on_another_device_than_the_tensors(backend, device):
    """Unsloth #4162 used the current device's memory. Here that is a device without any: what lands there raises."""
    hidden, weight, bias = torch.randn(8, 16), torch.randn(50, 16), torch.randn(50)
    labels, ids = torch.randint(50, (8,)), torch.arange(8) % 2
    options = {"backend": backend, "chunk_bytes": 3 * 64 * 4, "softcap": 5.0, "logit_scale": 0.5}
    results = []
    for current in (hidden.device, torch.device("meta")):
        with torch.device(current):
            leaves = leaves_of(hidden, weight, bias)
            loss, *both = linear_preference_loss(
                *leaves[:2], labels, ids, lambda c, r, i: r - c, num_pairs=1, bias=leaves[2], **options
            )
            sums = linear_sequence_logprob(*leaves[:2], labels, ids, 2, bias=leaves[2], **options)
            whole = sequence_logprob(hidden @ weight.t(), labels, ids, 2, backend=backend)
            (loss + sums.sum()).backward()
        results.append([loss, *both, sums, whole, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_kernels_are_launched_on_the_device_of_their_tensors(device, monkeypatch):
    """Triton launches on the current device: each launch stands in a guard of the device of its tensors."""
    pytest.importorskip("triton")
    from bdpo_kernels.rows import triton as rows

    guards = []

    @contextmanager
    def guarded(tensor):
        guards.append(tensor.device)
        yield
        guards.pop()

    monkeypatch.setattr(rows, "_on_device", guarded)
    hidden, weight = torch.randn(8, 16), torch.randn(50, 16)
    labels, ids = torch.randint(50, (8,)), torch.arange(8) % 2
    inside = []
    with recorded_launches(run=False, on_launch=lambda: inside.append(list(guards))):
        leaves = leaves_of(hidden, weight)
        loss, *_ = linear_preference_loss(
            *leaves, labels, ids, lambda c, r, i: r - c, num_pairs=1, backend="triton"
        )  # fmt: skip
        loss.backward()
        sequence_logprob(hidden @ weight.t(), labels, ids, 2, backend="triton")
    assert len(inside) > 4
    assert all(found == [hidden.device] for found in inside)


@pytest.mark.gpu
def test_peak_memory_is_gradients_and_one_chunk(device):
    """A temporary as large as the weight came and went unseen (Liger #1323)."""
    N, D, V = 2048, 1024, 32_000
    hidden = torch.randn(N, D, device=device, dtype=HALF, requires_grad=True)
    weight = torch.randn(V, D, device=device, dtype=HALF, requires_grad=True)
    labels, ids = torch.randint(V, (N,), device=device), torch.arange(N, device=device) * 8 // N
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, *_ = linear_preference_loss(hidden, weight, labels, ids, lambda c, r, i: r - c, num_pairs=4)
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    logits, of_weight, of_hidden = N * V * 4, V * D * 2, N * D * 2
    assert peak <= logits + of_weight + 3 * of_hidden + (64 << 20)


@pytest.mark.gpu
def test_tensors_on_another_than_the_current_device(device):
    """Kernels launched on the current device read another's memory (Unsloth #4162)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    hidden, weight = torch.randn(8, 16), torch.randn(50, 16)
    labels, ids = torch.randint(50, (8,)), torch.arange(8) % 2
    results = []
    for name in ("cuda:0", "cuda:1"):
        leaves = [t.to(name, copy=True).requires_grad_() for t in (hidden, weight)]
        loss, *_ = linear_preference_loss(
            *leaves, labels.to(name), ids.to(name), lambda c, r, i: r - c, num_pairs=1
        )  # fmt: skip
        loss.backward()
        results.append([loss.cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
