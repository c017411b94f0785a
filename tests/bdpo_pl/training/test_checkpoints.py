"""Runs that are stopped, by whatever, go on as if they had not been; checkpoints are whole or not there."""

import errno
import os
import resource
import signal
import warnings

import checkpoint_ranks
import pytest
import stopped_ranks
import torch
import training
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from ranks import run_ranks
from sharded_jobs import spawn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from trackers import Wandb

from bdpo_pl.errors import InputError, MachineError, StoppedError
from bdpo_pl.training.callbacks import LastCheckpoint, RandomState
from bdpo_pl.training.checkpoints import AtomicCheckpointIO, StopSignals, find_checkpoint, is_whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(40))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run of one process that nothing stopped."""
    return stopped_ranks.run(folder, "one-whole", 1)[:2]


@pytest.fixture(scope="module")
def two_ranks(folder):
    """The results of two processes: uninterrupted, stopped by either signal, and killed."""
    # Which of the two is seen to fail first is open: the killed one, or the one that misses it.
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        spawn(stopped_ranks.signalled_and_killed, folder)
    spawn(stopped_ranks.resumed, folder)
    return folder


def same(result, expected):
    state, evaluations = result
    assert all(torch.equal(state[name], value) for name, value in expected[0].items())
    assert evaluations.items() <= expected[1].items()
    assert max(evaluations) == max(expected[1])


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def logged(folder, name):
    """What was logged, by row; the clock aside."""
    return training.rows(folder / name / "metrics.csv")


# Four steps to an epoch, a validation after every second one: in the middle of an epoch with and without a validation
# before the stop, at the end of an epoch, and after the last step of the run.
@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGTERM, 4), (signal.SIGINT, 4), (signal.SIGTERM, 3), (signal.SIGTERM, 5), (signal.SIGTERM, 7)],
)
def test_signal_finishes_the_step_and_the_run_goes_on_exactly(folder, whole, number, step):
    name = f"{int(number)}-{step}"
    before = handlers()
    with pytest.raises(StoppedError, match=rf"stopped by {number.name} after {step + 1} optimiser steps") as stopped:
        stopped_ranks.run(folder, f"one-{name}", 1, stopped_ranks.SignalAt(number, 0, step))
    assert stopped.value.signal == number
    assert handlers() == before
    same(stopped_ranks.resume(folder, name, 1, "one")[:2], whole)
    # After a run that ends by itself, too.
    assert handlers() == before
    # Row by row, and the window of a log line that began before the stop.
    rows = logged(folder, f"one-{name}")
    if step < 7:
        rows += logged(folder, f"one-{name}-resumed")
    assert rows == logged(folder, "one-whole")


def test_killed_run_goes_on_from_its_last_checkpoint(folder, whole):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(stopped_ranks.killed, folder, "one-killed", 1, world_size=1)
    same(stopped_ranks.resume(folder, "killed", 1, "one")[:2], whole)


class Crash(stopped_ranks.L.Callback):
    """Ends the process, as far as the run can tell, at a batch of the second epoch."""

    def __init__(self, batch):
        self.batch = batch

    def on_before_backward(self, trainer, *_):
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if trainer.current_epoch == 1 and progress.ready == self.batch:
            raise RuntimeError("killed")


# Two batches to a step, a validation after every third: amid an accumulation, and at the end of a step.
@pytest.mark.parametrize("batch", [4, 5, 7])
def test_a_validation_amid_an_accumulation_loses_no_gradient(folder, batch):
    if not (folder / "one-amid").exists():
        torch.save(stopped_ranks.run(folder, "one-amid", 1, val_check_interval=3)[:2], folder / "amid.pt")
    expected = torch.load(folder / "amid.pt", weights_only=True)
    name = f"amid-{batch}"
    with pytest.raises(RuntimeError, match="killed"):
        stopped_ranks.run(folder, f"one-{name}", 1, Crash(batch), val_check_interval=3)
    path = find_checkpoint("last", folder / f"one-{name}")
    same(stopped_ranks.run(folder, f"one-{name}-resumed", 1, ckpt_path=path, val_check_interval=3)[:2], expected)
    # The step after the last validation logs nothing, so there is no file.
    rows = logged(folder, f"one-{name}-resumed") if batch < 7 else []
    assert (folder / f"one-{name}-resumed" / "metrics.csv").exists() == bool(rows)
    whole = logged(folder, "one-amid")
    assert rows == whole[len(whole) - len(rows) :]


@pytest.mark.parametrize("how", [int(signal.SIGTERM), int(signal.SIGINT), "killed"])
def test_two_ranks_go_on_exactly_too(two_ranks, how):
    expected = torch.load(two_ranks / "whole.pt", weights_only=True)
    same(torch.load(two_ranks / f"resumed-{how}.pt", weights_only=True), expected)


def test_what_two_ranks_have_trained_is_saved_before_it_is_measured(two_ranks):
    """Of several ranks one that is stopped in the generation after training cannot save alone."""
    trained, step = torch.load(two_ranks / "after.pt", weights_only=True)
    saved = torch.load(two_ranks / "ddp-after" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step
    assert saved["state_dict"].keys() == trained.keys()
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in trained.items())


def full_disk(monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def file_size_limit(monkeypatch):
    """The operating system's own refusal, in the middle of torch's writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fault", [full_disk, file_size_limit])
def test_disk_that_is_full_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, fault):
    path, old = tmp_path / "checkpoints" / "last.ckpt", {"weight": torch.zeros(10_000)}
    AtomicCheckpointIO().save_checkpoint(old, path)
    with monkeypatch.context() as patch:
        undo = fault(patch)
        try:
            with pytest.raises(MachineError, match=r"last\.ckpt cannot be written .*the one before it is untouched"):
                AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(10_000)}, path)
        finally:
            if undo:
                undo()
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], old["weight"])


def test_full_disk_in_the_middle_of_a_run_and_going_on(folder, whole, monkeypatch):
    class FullFrom(stopped_ranks.L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5:
                full_disk(monkeypatch)

    with pytest.raises(MachineError, match="No space left on device"):
        stopped_ranks.run(folder, "one-full", 1, FullFrom())
    monkeypatch.undo()
    same(stopped_ranks.resume(folder, "full", 1, "one")[:2], whole)


def test_truncated_checkpoint_is_never_picked_up(tmp_path):
    for version in range(3):
        path = tmp_path / f"version_{version}" / "checkpoints" / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(10_000)}, path)
        os.utime(path, (version, version))
    newest = path.read_bytes()
    for cut in (0, 100, len(newest) // 2, len(newest) - 1):
        path.write_bytes(newest[:cut])
        assert not is_whole(path)
        with pytest.raises(InputError, match="is not whole"):
            find_checkpoint(str(path), tmp_path)
        with pytest.raises(InputError, match="does not load as a checkpoint"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
        os.utime(path, (9, 9))
        with pytest.warns(UserWarning, match=r"version_2.*not whole and is passed over"):
            assert find_checkpoint("last", tmp_path) == str(tmp_path / "version_1" / "checkpoints" / "last.ckpt")
    path.write_bytes(newest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint("last", tmp_path) == str(path)


def test_a_save_in_parts_that_is_interrupted_leaves_the_checkpoint_before_it(tmp_path):
    run_ranks(checkpoint_ranks.an_interrupted_save, tmp_path, tmp_path)


def test_a_run_that_is_saved_in_parts_is_resumed_exactly(folder):
    spawn(checkpoint_ranks.saved_and_resumed, folder)


def test_ranks_that_would_resume_from_different_checkpoints_all_stop(tmp_path):
    run_ranks(checkpoint_ranks.unlike_checkpoints, tmp_path, tmp_path)


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    torch.save({"state_dict": {}, "bomb": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(InputError, match=r"bomb\.ckpt does not load as a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bomb.ckpt", weights_only=True)
    assert not (tmp_path / "run").exists()


def test_all_checkpoints_of_a_run_are_in_its_own_folder(tmp_path):
    """W&B has one folder for all runs, in which Lightning gives each its own: what a stop saves belongs there too."""
    logger = Wandb([])
    vars(logger).update(_save_dir=str(tmp_path), _project="aligned", _experiment=None, _id="run7")
    last = LastCheckpoint()
    trainer = stopped_ranks.L.Trainer(accelerator="cpu", logger=logger, callbacks=[last], enable_progress_bar=False)
    last.setup(trainer, None, "fit")
    assert StopSignals._path(trainer) == tmp_path / "aligned" / "run7" / "checkpoints" / "last.ckpt"


def test_a_run_on_the_cpu_leaves_the_gpu_alone(monkeypatch):
    trainer = stopped_ranks.L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("initialised"))
    checkpoint = {}
    RandomState().on_save_checkpoint(trainer, None, checkpoint)
    assert checkpoint["random_state"].keys() == {"cpu"}
    # One of a run on a GPU.
    checkpoint["random_state"]["cuda"] = torch.zeros(1, 16, dtype=torch.uint8)
    RandomState().on_load_checkpoint(trainer, None, checkpoint)
