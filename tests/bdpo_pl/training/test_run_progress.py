"""A run's progress, in a log and in a terminal of 80 columns."""

import math
import re
import warnings
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from counting import HostReads
from rich.console import Console

from bdpo_pl.losses import BalancedDPOLoss, DPOLoss
from bdpo_pl.training import run_progress
from bdpo_pl.training.run_progress import RunProgress


@pytest.fixture
def run(job):
    def train(loss=None, **trainer):
        options = {"enable_progress_bar": True, "callbacks": [RunProgress()], **trainer}
        built, module, data = job(trainer=options, loss=loss or BalancedDPOLoss())
        built.fit(module, data)
        return module

    return train


def test_a_log_has_a_line_every_few_steps(run, capsys):
    run(max_epochs=2, log_every_n_steps=2)
    printed = capsys.readouterr().out
    steps = re.findall(
        r"^step (\d+) of 16, loss [\d.]+, margin \S+, accuracy \S+%, \S+ pairs/s, padding \d+%, \S+ [MG]B(.*)$",
        printed,
        re.M,
    )
    assert [int(step) for step, _ in steps] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert all("left" in rest for _, rest in steps[:-1])
    assert re.search(r"^Training: about .* for 16 optimiser steps", printed, re.M)
    assert len(re.findall(r"^after step \d+: held-out loss [\d.]+, accuracy", printed, re.M)) == 2


@pytest.mark.parametrize("ranks", [1, 3])
def test_pairs_per_second_are_those_of_all_ranks(run, monkeypatch, capsys, ranks):
    """Of a clock that goes on by a second at each look, which is once a batch of 4 pairs."""
    monkeypatch.setattr(run_progress, "data_ranks", lambda trainer: (0, ranks))
    ticks = iter(range(100))
    run(max_steps=3, log_every_n_steps=1, callbacks=[RunProgress(lambda: float(next(ticks)))])
    assert re.findall(r"(\S+) pairs/s, pad", capsys.readouterr().out) == [f"{4 * ranks}"] * 3


def test_a_batch_is_counted_without_waiting_for_its_device():
    progress, trainer = RunProgress(), SimpleNamespace(global_step=1)
    progress.disable()
    with HostReads() as reads:
        for weights in ([0.5, 0.0], [0.5, 0.5]):
            progress.on_train_batch_end(trainer, None, None, SimpleNamespace(pair_weight=torch.tensor(weights)), 0)
    assert reads.calls == []
    assert int(progress._pairs) == 3


def test_steps_that_end_a_run_early_are_its_total(run, capsys):
    run(max_epochs=2, max_steps=3, log_every_n_steps=1)
    assert re.findall(r"^step (\d+ of \d+)", capsys.readouterr().out, re.M) == ["1 of 3", "2 of 3", "3 of 3"]


def test_a_run_of_few_steps_is_warned_of_unless_they_were_requested(run):
    with pytest.warns(UserWarning, match="only 1 optimiser step of 8 batches each; lower trainer.accumulate_grad_ba"):
        run(accumulate_grad_batches=8)
    with pytest.warns(UserWarning, match="only 8 optimiser steps; lower data.batch_size, or raise trainer.max_epochs"):
        run()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*optimiser step")
        run(max_epochs=1, max_steps=1)
        run(max_epochs=2)


def test_validations_between_which_nothing_is_trained_are_warned_of(run):
    often = "a validation follows every 2 batches, but an optimiser step only every 8: most validations measure"
    with pytest.warns(UserWarning, match=often):
        run(accumulate_grad_batches=8, val_check_interval=0.25)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a validation follows")
        run(accumulate_grad_batches=4, val_check_interval=4)
        run(accumulate_grad_batches=8, val_check_interval=0.25, limit_val_batches=0)
        run(accumulate_grad_batches=8, check_val_every_n_epoch=None, val_check_interval=8)


def test_balance_weights_that_leave_a_response_untrained_are_warned_of(run):
    module = run(max_epochs=2)
    chosen, rejected = module.reference.scores("train", torch.arange(32)).comprehension.double()
    size = (chosen - rejected).abs().sort().values
    # So small a τ that more than half of the pairs have weights of more than 100 to 1.
    tau = size[14].item() / math.log(101)
    with pytest.warns(UserWarning, match=r"in half of the training pairs .* weight of the other.*max_weight_ratio"):
        run(BalancedDPOLoss(tau=tau), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="in half of the training pairs")
        run(BalancedDPOLoss(tau=tau, max_weight_ratio=20.0), max_epochs=2)
        run(BalancedDPOLoss(tau=size[16].item() / math.log(49)), max_epochs=2)
        run(DPOLoss(), max_epochs=2)


def test_a_bar_fits_80_columns(run, monkeypatch):
    console = Console(file=StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(run_progress, "shows_bars", lambda: True)
    monkeypatch.setattr(run_progress, "get_console", lambda: console)
    run(log_every_n_steps=1)
    frames = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", console.file.getvalue()))
    last = next(frame for frame in reversed(frames) if "step" in frame and "/" in frame)
    assert re.search(r"step 8/8 .*loss [\d.]+ margin \S+", last)
    assert max(map(len, frames)) <= 80
