"""Half precision on CPUs: with instructions for its products and without. What a CPU can do is told to the tests."""

import pytest
import torch
import torch.nn.functional as F

from bdpo_kernels import linear_head, linear_preference_loss, products
from bdpo_kernels.chunks import gradient_dtype

CPU = torch.device("cpu")
HALF = torch.bfloat16
N, D, V, B = 18, 8, 50, 3


@pytest.fixture
def can(monkeypatch):
    """Say what the CPU can do: oneDNN computes the same without it, slowly."""
    return lambda *names: monkeypatch.setattr(products, "_CPU_CAPABILITIES", dict.fromkeys(names, True))


@pytest.mark.parametrize(
    ("capability", "dtype", "fast"),
    [
        ("amx_bf16", HALF, True),
        ("avx512_bf16", HALF, False),
        ("avx512_bf16", torch.float16, False),
        ("amx_fp16", torch.float16, True),
        ("avx2", HALF, False),
    ],
)
def test_gradients_of_logits_are_in_half_precision_where_the_cpu_multiplies_it(can, capability, dtype, fast):
    can(capability)
    assert products.has_fast_half(dtype) is fast
    assert gradient_dtype(dtype, torch.float32, CPU, "torch") == (dtype if fast else torch.float32)


def test_what_this_cpu_can_do_is_what_torch_says():
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    assert products.has_fast_half(HALF) == bool(known.get("amx_bf16"))
    assert not products.has_fast_half(torch.float32)


@pytest.mark.parametrize("chunk_bytes", [None, 6 * V * 4])
@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16"])
def test_log_probabilities_are_exact_and_gradients_right_either_way(can, monkeypatch, capability, chunk_bytes):
    can(capability)
    hidden, weight = torch.randn(N, D).to(HALF), (torch.randn(V, D) / 2).to(HALF)
    labels, ids = torch.randint(V, (N,)), torch.arange(N) % (2 * B)
    leaves = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    token = (leaves[0] @ leaves[1].t()).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    sums = token.new_zeros(2 * B).index_add(0, ids, token)
    expected = torch.autograd.grad(-F.logsigmoid(sums[:B] - sums[B:]).sum(), leaves)
    dtypes, product = set(), linear_head.hidden_product
    monkeypatch.setattr(
        linear_head, "hidden_product", lambda gradient, w: dtypes.add(gradient.dtype) or product(gradient, w)
    )
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, *both = linear_preference_loss(
        *ours, labels, ids, lambda c, r, i: -F.logsigmoid(c - r), num_pairs=B, backend="torch", chunk_bytes=chunk_bytes
    )
    loss.backward()
    assert dtypes == {HALF if capability == "amx_bf16" else torch.float32}
    torch.testing.assert_close(torch.cat(both).double(), sums, rtol=1e-5, atol=1e-5)
    for leaf, grad in zip(ours, expected, strict=True):
        assert (leaf.grad.double() - grad).norm() <= 1e-2 * grad.norm()
