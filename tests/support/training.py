"""Short runs, for the tests of training."""

import csv

import torch

from bdpo_pl.training.throughput import TIMED


def adamw(params):
    # With eps at its default of 1e-8 the rounding of a gradient that is nearly 0 becomes a step of its own, and two
    # orders of summation end at different weights.
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1, eps=1e-6)


def fused_adamw(params):
    """One operation for all weights: with parts of weights each of many costs more than its arithmetic."""
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1, eps=1e-6, fused=True)


def sgd(params):
    # Adam's first steps make the rounding of a small gradient as large as the gradient; here it stays small.
    return torch.optim.SGD(params, lr=0.1)


def fit(job, ckpt_path=None):
    trainer, module, data = job
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def weights(module):
    return {name: p.detach().clone() for name, p in module.policy.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def rows(path):
    """The rows of a `metrics.csv`; what a clock or the machine determines aside."""
    with path.open() as file:
        return [{k: v for k, v in row.items() if v and k not in TIMED} for row in csv.DictReader(file)]
