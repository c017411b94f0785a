"""What each of two ranks does in the test of tensor parallelism: a whole model beside its own parts of it."""

import copy
from unittest import mock

import torch
import torch.distributed as dist
from architectures import tiny
from makers import large
from torch.distributed.device_mesh import init_device_mesh

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.forward.fused_loss import fused_preference_loss
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.parallel.tensor_parallel import check_tensor_parallel, parallelize

PAIRS = [
    PreferencePair(list(range(5, 30)), [9, 10, 11, 12, 4], [13, 4]),
    PreferencePair([40], [41, 42, 4], [43, 44, 45, 46, 47, 48, 4]),
]


def parts_equal_the_whole(rank, names):
    mesh = init_device_mesh("cpu", (2,))
    for name in names:
        whole = large(tiny(name), 0.1).eval()
        check_tensor_parallel(whole.config, 2, name)
        split = copy.deepcopy(whole)
        parallelize(split, mesh)
        batch = lay_out(pair_documents(PAIRS), RowLayout.SHARED, 0)
        for run in (plain, fused):
            with no_logits_gathered():
                value, logps = run(split, batch)
            expected_value, expected = run(whole, batch)
            torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-4)
            for model, loss in ((split, value), (whole, expected_value)):
                model.zero_grad()
                loss.backward()
            own = dict(split.named_parameters())
            for key, parameter in whole.named_parameters():
                torch.testing.assert_close(
                    own[key].grad.full_tensor(), parameter.grad,
                    rtol=1e-3, atol=1e-5 * float(parameter.grad.abs().max()),
                    msg=lambda m, n=name, k=key: f"{n}, {k}: {m}",
                )  # fmt: skip
        with torch.no_grad(), no_logits_gathered():
            torch.testing.assert_close(response_logps(split, batch), expected.flatten(), rtol=1e-5, atol=1e-4)


def no_logits_gathered():
    """Refuse what the head gathers for generation: in training it has no positions, and the ranks would wait."""
    return mock.patch.object(dist, "all_gather", side_effect=AssertionError("the head gathered logits"))


def plain(model, batch):
    logps = response_logps(model, batch)
    return (logps * torch.tensor([1.0, -0.5, 2.0, 0.25])).sum(), logps.detach()


def fused(model, batch):
    loss, logps = fused_preference_loss(model, batch, lambda c, r, i: (1.0 + i) * (c - 0.5 * r))
    return loss, logps.flatten()
