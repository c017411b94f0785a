"""Faults of the machine and of what users bring: a message that says what to do, and an exit status of its own."""

import errno
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from bdpo_pl.cli.command import run_command
from bdpo_pl.cli.machine_faults import machine_error
from bdpo_pl.data.batches import PairDataset
from bdpo_pl.errors import MachineError, StoppedError
from bdpo_pl.fit import main
from bdpo_pl.training.module import PreferenceModule

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(model_dir, preference_file, tmp_path, monkeypatch, capfd):
    """The command in this process; its exit status and what it said on stderr, in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))

    def run(*options):
        with pytest.raises(SystemExit) as stopped:
            main([
                f"--model.policy={model_dir}",
                f"--data.train={preference_file}",
                "--data.held_out_fraction=0.2",
                "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false",
                *options,
            ])  # fmt: skip
        return stopped.value.code, " ".join(capfd.readouterr().err.split())

    return run


def test_out_of_memory_at_a_step_says_what_to_lower(run, monkeypatch):
    def fail(self, batch, batch_idx):
        # More than any machine has: the allocator's own error.
        torch.empty(1 << 60)

    monkeypatch.setattr(PreferenceModule, "training_step", fail)
    status, said = run()
    assert status == 4
    assert re.search(r"error: out of memory: .*can't allocate.*Lower.*data\.batch_size.*gradient_checkpointing", said)


def test_out_of_memory_of_a_gpu_is_told_alike():
    error = machine_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert isinstance(error, MachineError)
    assert "Tried to allocate 2.00 GiB" in str(error)
    assert "trainer.strategy fsdp2" in str(error)


def test_killed_data_worker_is_named(run, monkeypatch):
    def die(self, keys):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(PairDataset, "collate", die)
    before = signal.getsignal(signal.SIGCHLD)
    status, said = run("--data.num_workers=1")
    signal.signal(signal.SIGCHLD, before)
    assert status == 4
    assert re.search(r"error: a process that builds batches died: .*data\.num_workers.*--ckpt_path last", said)


@pytest.mark.parametrize("how", ["from it", "while it was handled", "twice"])
def test_killed_data_worker_is_named_from_within_another_error(how):
    """Torch tells of it in a handler of a signal, amid any code, which may turn it into an error of its own."""
    said = "DataLoader worker (pid 7) is killed by signal: Killed."
    found = None
    try:
        try:
            raise RuntimeError(said)
        except RuntimeError as died:
            if how == "while it was handled":
                raise KeyError("unsupported callable")  # noqa: B904
            try:
                raise TypeError("unsupported callable") from died
            except TypeError as error:
                if how == "twice":
                    raise ValueError("no signature") from error
                raise
    except Exception as error:
        found = machine_error(error)
    assert f"a process that builds batches died: {said} The system" in str(found)


def test_workers_that_die_later_do_not_change_the_exit_status(monkeypatch, capfd):
    def another_worker_died(number, frame):
        raise RuntimeError("DataLoader worker (pid 2) is killed by signal: Killed.")

    def command():
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr("bdpo_pl.cli.command.printable", lambda text: [text, os.kill(os.getpid(), signal.SIGCHLD)][0])
    before = signal.signal(signal.SIGCHLD, another_worker_died)
    try:
        with pytest.raises(SystemExit) as stopped:
            run_command(command)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert stopped.value.code == 4
    assert "pid 1" in capfd.readouterr().err


def test_full_disk_is_named_whoever_met_it(run, monkeypatch):
    def fail(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/version_0/metrics.csv")

    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.save", fail)
    status, said = run()
    assert status == 4
    assert re.search(r"error: the disk is full: .*metrics\.csv.*Free space", said)


def test_other_errors_keep_their_traceback(run, monkeypatch):
    assert machine_error(RuntimeError("a bug")) is None
    assert machine_error(OSError(errno.ENOENT, "no such file")) is None

    def fail(self, batch, batch_idx):
        raise KeyError("a bug")

    monkeypatch.setattr(PreferenceModule, "training_step", fail)
    with pytest.raises(KeyError, match="a bug"):
        run()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (None, 0)])
def test_stopped_run_ends_with_the_signals_status(run, monkeypatch, number, status):
    def stop(self, batch, batch_idx):
        raise StoppedError("stopped after 3 optimiser steps", number)

    monkeypatch.setattr(PreferenceModule, "training_step", stop)
    assert run()[0] == status


def test_truncated_checkpoint_is_refused_before_any_work(run, tmp_path, monkeypatch):
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {}}, path)
    path.write_bytes(path.read_bytes()[:-30])
    monkeypatch.setattr("bdpo_pl.scoring.reference.score_table", lambda *_, **__: pytest.fail("scored"))
    status, said = run(f"--ckpt_path={path}")
    assert status == 2
    assert "cut.ckpt is not whole" in said


def test_code_that_comes_with_a_model_is_not_run_unasked(run, model_dir, tmp_path):
    import json
    import shutil

    folder = tmp_path / "custom"
    shutil.copytree(model_dir, folder)
    (folder / "custom.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import Qwen2Config as Config, Qwen2ForCausalLM as Model\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    status, said = run(f"--model.policy={folder}")
    assert status == 2
    assert re.search(r"error: cannot load .*custom.*set model\.trust_remote_code to true", said)
    assert not (tmp_path / "ran").exists()


def test_folder_of_another_run_is_refused(run, tmp_path):
    from bdpo_pl.files import RunFolder

    with RunFolder(tmp_path / "runs" / "mine"):
        (tmp_path / "runs" / "mine" / "file").touch()
        status, said = run("--trainer.logger.init_args.version=mine")
    assert status == 2
    assert "another run is writing the folder" in said


@pytest.mark.parametrize(("page", "least"), [("docs/faults.md", 90), ("SECURITY.md", 15)])
def test_every_row_of_the_tables_names_a_test_that_is_there(page, least):
    """Of the faults, and of the promises of security."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) >= least
    for row in rows:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            found = list((ROOT / "tests").rglob(f"{file}.py"))
            assert found, row
            assert any(f"def {test}(" in path.read_text(encoding="utf-8") for path in found), row


def test_every_fault_that_was_found_is_named_with_its_number():
    text = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    numbers = re.findall(r"^\| (\d+) \| .*`test_", text, re.MULTILINE)
    assert numbers == [str(i) for i in range(1, 34)]
