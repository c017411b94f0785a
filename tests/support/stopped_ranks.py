"""Runs that something stops, and their resumption, for the tests of checkpoints."""

import os
import signal

import lightning as L
import pytest
import torch
from sharded_jobs import train

from bdpo_pl.errors import StoppedError
from bdpo_pl.training.callbacks import LastCheckpoint
from bdpo_pl.training.checkpoints import StopSignals, find_checkpoint, write_atomically
from bdpo_pl.training.identity import RunIdentity
from bdpo_pl.training.metrics_file import MetricsRows

# Eight batches an epoch, two to a step: 4 steps. Validation after steps 1, 2, … of which each writes last.ckpt.
OPTIONS = {"sharing": 4, "trainer": {"accumulate_grad_batches": 2, "val_check_interval": 4, "log_every_n_steps": 3}}


class SignalAt(L.Callback):
    """Sends this process a signal in the middle of a step, on one rank."""

    def __init__(self, number, rank, step=4):
        self.number, self.rank, self.step = number, rank, step
        self.sent = False

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == self.step and trainer.global_rank == self.rank and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


class SignalAfterTraining(L.Callback):
    """Sends every process a signal where the policy is measured after the last step, and keeps what was trained."""

    def on_train_end(self, trainer, pl_module):
        self.trained = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        os.kill(os.getpid(), signal.SIGTERM)


class Atomic(L.Callback):
    def setup(self, trainer, *_, **__):
        write_atomically(trainer)


def run(folder, name, world_size, *callbacks, ckpt_path=None, **trainer):
    identity = [RunIdentity(ckpt_path), MetricsRows()]
    callbacks = [Atomic(), LastCheckpoint(), StopSignals(), *identity, *callbacks]
    options = {**OPTIONS, "sharing": 2 * world_size, "trainer": {**OPTIONS["trainer"], **trainer}}
    return train(folder, name, world_size, callbacks=callbacks, ckpt_path=ckpt_path, **options)


def resume(folder, name, world_size, strategy):
    path = find_checkpoint("last", folder / f"{strategy}-{name}")
    return run(folder, f"{strategy}-{name}-resumed", world_size, ckpt_path=path)


def keep(rank, folder, name, result):
    if rank == 0:
        torch.save(result[:2], folder / f"{name}.pt")


def signalled_and_killed(rank, folder):
    keep(rank, folder, "whole", run(folder, "ddp-whole", 2))
    # The signal reaches one rank alone, as a batch system may have it.
    for number, receiver in ((signal.SIGTERM, 1), (signal.SIGINT, 0)):
        with pytest.raises(StoppedError, match="after 5 optimiser steps"):
            run(folder, f"ddp-{int(number)}", 2, SignalAt(number, receiver))
        keep(rank, folder, f"resumed-{int(number)}", resume(folder, str(int(number)), 2, "ddp"))
    after = SignalAfterTraining()
    # A step after the last validation.
    with pytest.raises(StoppedError, match=r"stopped by SIGTERM$"):
        run(folder, "ddp-after", 2, after, max_steps=7)
    keep(rank, folder, "after", (after.trained, 7))
    killed(rank, folder, "ddp-killed", 2)


def killed(rank, folder, name, world_size):
    run(folder, name, world_size, SignalAt(signal.SIGKILL, world_size - 1))


def resumed(rank, folder):
    keep(rank, folder, "resumed-killed", resume(folder, "killed", 2, "ddp"))
