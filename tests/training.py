"""Short runs, for the tests of training."""

import torch


def adamw(params):
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1)


def fit(job, ckpt_path=None):
    trainer, module, data = job
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def weights(module):
    return {name: p.detach().clone() for name, p in module.policy.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)
