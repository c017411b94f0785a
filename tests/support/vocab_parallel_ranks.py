"""What each rank does in the test of the vocabulary-parallel operations."""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from interpreter import interprets, look_up_once

from bdpo_kernels import VocabShard, linear_preference_loss, linear_sequence_logprob

N, D, V, B = 13, 6, 51, 4  # V is odd: the ranks hold 26 and 25 rows
IGNORED = -100
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 1e-1}
OPTIONS = [{}, {"softcap": 2.0, "logit_scale": -1.5}, {"logit_scale": 0.25}]


def backends():
    """The ranks' tensors are on the CPU, where Triton's kernels run in its interpreter alone."""
    return ("torch", "triton") if interprets() else ("torch",)


def loss_fn(chosen, rejected, pair_index):
    return -(1.0 + pair_index) * F.logsigmoid(0.3 * (chosen - 0.7 * rejected))


def inputs(dtype):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, D, generator=g, dtype=torch.float64) / 2).to(dtype)
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (N,), generator=g)
    labels[::5] = IGNORED
    return hidden, weight, bias, labels, torch.randint(2 * B, (N,), generator=g)


def oracle(hidden, weight, bias, labels, ids, softcap=None, logit_scale=1.0):
    """Log-probabilities, loss and gradients of the whole vocabulary, by float64 autograd."""
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    x = F.linear(*leaves)
    u = logit_scale * (softcap * torch.tanh(x / softcap) if softcap else x)
    token = torch.log_softmax(u, -1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    logps = x.new_zeros(2 * B).index_add(0, ids, torch.where(labels != IGNORED, token, 0.0))
    loss = loss_fn(logps[:B], logps[B:], torch.arange(B)).sum()
    return logps.detach(), loss.detach(), torch.autograd.grad(loss, leaves)


def compare_with_the_whole(rank):
    """Both operations, by each backend, in two chunks (7 tokens and 6) and all at once, against the oracle."""
    start, end = (0, 26) if rank == 0 else (26, 51)
    shard = VocabShard(start, V)
    for dtype, options, backend in itertools.product(TOLERANCES, OPTIONS, backends()):
        hidden, weight, bias, labels, ids = inputs(dtype)
        logps, loss, grads = oracle(hidden, weight, bias, labels, ids, **options)
        for chunk_bytes in (7 * 26 * dtype.itemsize, None):
            kwargs = {**options, "backend": backend, "chunk_bytes": chunk_bytes}
            for fused in (True, False):
                leaves = [t.clone().requires_grad_() for t in (hidden, weight[start:end], bias[start:end])]
                if fused:
                    found_loss, *both = linear_preference_loss(
                        *leaves[:2], labels, ids, loss_fn, num_pairs=B, bias=leaves[2], shard=shard, **kwargs
                    )
                    found = torch.cat(both)
                else:
                    found = linear_sequence_logprob(
                        *leaves[:2], labels, ids, 2 * B, shard=shard, bias=leaves[2], **kwargs
                    )
                    found_loss = loss_fn(found[:B], found[B:], torch.arange(B)).sum()
                found_grads = torch.autograd.grad(found_loss, leaves)
                expected = [logps, loss, grads[0], grads[1][start:end], grads[2][start:end]]
                tolerance = TOLERANCES[dtype]
                for name, mine, right in zip(
                    ("logps", "loss", "hidden", "weight", "bias"), (found, found_loss, *found_grads), expected,
                    strict=True,
                ):  # fmt: skip
                    torch.testing.assert_close(
                        mine.detach().double(), right, rtol=tolerance, atol=tolerance,
                        msg=lambda m, case=(name, dtype, backend, fused, options): f"{case}: {m}",
                    )  # fmt: skip


def nothing_of_the_vocabulary_is_sent(rank):
    """No collective carries more than three numbers a token, or the hidden states' gradient."""
    sent, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    def forbidden(*args, **kwargs):
        raise AssertionError("something was gathered")

    dist.all_reduce = counting
    for name in ("all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "all_to_all"):
        setattr(dist, name, forbidden)
    hidden, weight, _, labels, ids = inputs(torch.float32)
    start, end = (0, 26) if rank == 0 else (26, 51)
    loss, *_ = linear_preference_loss(
        hidden.requires_grad_(), weight[start:end].clone().requires_grad_(), labels, ids, loss_fn, num_pairs=B,
        shard=VocabShard(start, V),
    )  # fmt: skip
    loss.backward()
    kept = int((labels != IGNORED).sum())
    assert sorted(sent) == sorted([kept, 2 * kept, N * D]), sent


def numerical_derivative(rank):
    """gradcheck, in float64."""
    hidden, weight, bias, labels, ids = inputs(torch.float64)
    start, end = (0, 26) if rank == 0 else (26, 51)
    shard = VocabShard(start, V)
    # A rank's numerical derivative would need the other's weight moved with it: the hidden states are common to both.
    assert torch.autograd.gradcheck(
        lambda h: linear_sequence_logprob(h, weight[start:end], labels, ids, 2 * B, shard=shard, bias=bias[start:end]),
        hidden.requires_grad_(),
        fast_mode=True,
    )


def labels_at_the_edges(rank):
    """Labels in the last column of each rank and the first of the next, of an uneven split that no block divides.

    A sentinel that meant "elsewhere" once hit a padded column (cut-cross-entropy PR#59). Logits at a large offset, so
    that a padded column would show; a rank whose columns are all far below the other's adds nothing.
    """
    start, end = (0, 26) if rank == 0 else (26, 51)
    labels, ids = torch.tensor([0, 25, 26, 50, 25, 50]), torch.tensor([0, 1, 2, 3, 0, 1])
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(6, D, generator=g)
    weight, bias = torch.randn(V, D, generator=g), torch.full((V,), -64.0)
    bias[26:] -= 128.0
    for backend, softcap in itertools.product(backends(), (None, 50.0)):
        options = {"softcap": softcap} if softcap else {}
        logps, grads = oracle_of(hidden, weight, bias, labels, ids, **options)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight[start:end], bias[start:end])]
        found_loss, *both = linear_preference_loss(
            *leaves[:2], labels, ids, lambda c, r, i: -F.logsigmoid(0.01 * (c - r)), num_pairs=2, bias=leaves[2],
            shard=VocabShard(start, V), backend=backend, **options,
        )  # fmt: skip
        found_loss.backward()
        torch.testing.assert_close(torch.cat(both).double(), logps, rtol=1e-5, atol=1e-4)
        for leaf, right in zip(leaves, (grads[0], grads[1][start:end], grads[2][start:end]), strict=True):
            torch.testing.assert_close(leaf.grad.double(), right, rtol=1e-3, atol=1e-5)


def oracle_of(hidden, weight, bias, labels, ids, softcap=None):
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    x = F.linear(*leaves)
    u = softcap * torch.tanh(x / softcap) if softcap else x
    token = u.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    logps = x.new_zeros(4).index_add(0, ids, token)
    loss = -F.logsigmoid(0.01 * (logps[:2] - logps[2:])).sum()
    return logps.detach(), torch.autograd.grad(loss, leaves)


def one_chunk_and_a_thousand(rank):
    """The error of a half-precision weight gradient does not grow with the chunks, and a split head is exact too."""
    start, end = (0, 26) if rank == 0 else (26, 51)
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(1000, D, generator=g).bfloat16(), (10 * torch.randn(V, D, generator=g)).bfloat16()
    labels, ids = torch.randint(V, (1000,), generator=g), torch.arange(1000) % 1000
    leaf = weight.double().requires_grad_()
    logps = F.linear(hidden.double(), leaf).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    (right,) = torch.autograd.grad(-logps.sum(), leaf)
    errors = []
    for chunk_bytes in (None, 26 * 4):
        part = weight[start:end].clone().requires_grad_()
        loss, chosen, rejected = linear_preference_loss(
            hidden, part, labels, ids, lambda c, r, i: -(c + r), num_pairs=500, shard=VocabShard(start, V),
            chunk_bytes=chunk_bytes,
        )  # fmt: skip
        loss.backward()
        assert abs(torch.cat([chosen, rejected]).double().sum() - logps.sum()).item() < 2e-3
        errors.append(((part.grad.double() - right[start:end]).norm() / right[start:end].norm()).item())
    assert max(errors) < 3e-3, errors
    assert errors[1] < 1.1 * errors[0], errors


def everything(rank):
    if interprets():
        look_up_once()
    compare_with_the_whole(rank)
    labels_at_the_edges(rank)
    one_chunk_and_a_thousand(rank)
    numerical_derivative(rank)
    nothing_of_the_vocabulary_is_sent(rank)
