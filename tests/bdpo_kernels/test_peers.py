"""Values and gradients of the peers, where the `bench` extra has installed them."""

import pytest
import torch
import torch.nn.functional as F

from bdpo_kernels import linear_preference_loss, sequence_logprob

T, D, V, B = 6, 16, 40, 3


@pytest.fixture
def problem(device):
    """Hidden states of 2B padded sequences, weight, labels with the ends of two sequences ignored."""
    hidden = torch.randn(2 * B, T, D, device=device)
    labels = torch.randint(V, (2 * B, T), device=device)
    labels[1, 4:] = labels[3, 2:] = -100
    return hidden, torch.randn(V, D, device=device) / 4, labels


def ours(hidden, weight, labels):
    ids = torch.arange(2 * B, device=hidden.device).repeat_interleave(T)
    loss, chosen, rejected = linear_preference_loss(
        hidden.flatten(0, 1), weight, labels.flatten(), ids, lambda c, r, i: -F.logsigmoid(0.1 * (c - r)), num_pairs=B
    )
    return loss / B, chosen, rejected


def test_liger_fused_linear_dpo(problem):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    hidden, weight, labels = problem
    results = []
    for run in ("ours", "peer"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if run == "ours":
            loss, *_ = ours(h, w, labels)
        else:
            peer = chunked.LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False, compiled=False)
            loss = peer(w, h, labels)
            loss = loss[0] if isinstance(loss, tuple) else loss
        results.append((loss, *torch.autograd.grad(loss, (h, w))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_trl_selective_log_softmax(problem):
    utils = pytest.importorskip("trl.trainer.utils")
    hidden, weight, labels = problem
    logits = (hidden @ weight.t()).requires_grad_()
    kept = labels != -100
    expected = (utils.selective_log_softmax(logits, labels.clamp(min=0)) * kept).sum(1)
    sums = sequence_logprob(logits, labels)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    g = torch.arange(1.0, 2 * B + 1, device=logits.device)
    (grad,) = torch.autograd.grad((sums * g).sum(), logits)
    (other,) = torch.autograd.grad((expected * g).sum(), logits)
    torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_trl_chunked_log_probabilities(problem):
    chunked = pytest.importorskip("trl.kernels.chunked_logprob")
    hidden, weight, labels = problem
    _, chosen, rejected = ours(hidden, weight, labels)
    kept = labels != -100
    flat = hidden.flatten(0, 1)
    outputs = chunked.ChunkedLogProbFunction.apply(
        flat, weight, None, labels.clamp(min=0).flatten(), 1.0, 16, None, 1.0, ()
    )
    expected = (outputs[0].view(2 * B, T) * kept).sum(1)
    torch.testing.assert_close(torch.cat([chosen, rejected]), expected, rtol=1e-5, atol=1e-5)
