"""What each rank does in the test of a head that FSDP2 shards."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bdpo_kernels import linear_preference_loss, linear_sequence_logprob

T, D, V, B = 5, 8, 21, 4


class Model(nn.Module):
    """A layer and an LM head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x):
        return self.head(self.body(x))


def losses(chosen, rejected, index):
    return -F.logsigmoid(0.5 * (chosen - rejected))


def gradients(model, hidden, labels, pairs):
    """The loss of `pairs` pairs, computed where the hidden states enter the head, and the weight as it was there."""
    found = []

    def at_the_head(module, args):
        ids = torch.arange(2 * pairs).repeat_interleave(T)
        loss, *_ = linear_preference_loss(args[0], module.weight, labels, ids, losses, num_pairs=pairs)
        found.append((loss, type(module.weight.data), tuple(module.weight.shape)))
        return (args[0][:0],)

    handle = model.head.register_forward_pre_hook(at_the_head)
    model(hidden)
    handle.remove()
    ((loss, kind, shape),) = found
    loss.backward()
    return loss.detach(), kind, shape


def a_sharded_head(rank):
    """Gradients of two ranks, a half of the pairs each, are those of one with all; with the head in a group or not."""
    torch.manual_seed(5)
    hidden, labels = torch.randn(2 * B, T, D), torch.randint(V, (2 * B, T))
    whole = Model()
    expected, _, _ = gradients(whole, hidden.flatten(0, 1), labels.flatten(), B)
    mine = [pair + side * B for side in range(2) for pair in range(rank * B // 2, (rank + 1) * B // 2)]
    for apart in (False, True):
        model = Model()
        # As the blocks of a model are: the end of their backward pass is the end of the whole one.
        fully_shard(model.body)
        if apart:
            fully_shard(model.head)
        fully_shard(model)
        assert isinstance(model.head.weight, DTensor)
        loss, kind, shape = gradients(model, hidden[mine].flatten(0, 1), labels[mine].flatten(), B // 2)
        # Read within its hooks it is whole, and gathered by FSDP2 alone.
        assert kind is torch.Tensor
        assert shape == (V, D)
        dist.all_reduce(loss)
        torch.testing.assert_close(loss, expected)
        for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert isinstance(parameter.grad, DTensor), name
            # FSDP2 takes the mean over ranks.
            torch.testing.assert_close(2 * parameter.grad.full_tensor(), other.grad, msg=name)


def a_head_past_its_hooks(rank):
    """A sharded weight and bias passed as they are: each part's gradient is of all ranks' pairs, not of its own rank's.

    Each rank has other tokens, so a gradient that is not sent is the wrong one.
    """
    torch.manual_seed(7)
    hidden, labels = torch.randn(2, 2 * B * T, D), torch.randint(V, (2, 2 * B * T))
    ids = torch.arange(2 * B).repeat_interleave(T)
    whole = [torch.randn(V, D).requires_grad_(), torch.randn(V).requires_grad_()]
    mesh = dist.init_device_mesh("cpu", (2,))
    for fused in (True, False):
        parts = [distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in whole]
        total = sum(value(fused, hidden[other], *whole, labels[other], ids) for other in range(2))
        expected = torch.autograd.grad(total, whole)
        value(fused, hidden[rank], *parts, labels[rank], ids).backward()
        for part, right in zip(parts, expected, strict=True):
            # The mean over ranks, as FSDP2 and DDP take it.
            torch.testing.assert_close(2 * part.grad.full_tensor(), right)


def value(fused, hidden, weight, bias, labels, ids):
    if fused:
        return linear_preference_loss(hidden, weight, labels, ids, losses, num_pairs=B, bias=bias)[0]
    sums = linear_sequence_logprob(hidden, weight, labels, ids, 2 * B, bias=bias)
    return losses(sums[:B], sums[B:], None).sum()
