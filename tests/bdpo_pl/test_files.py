"""Who may write the folder of a run."""

import multiprocessing
import os
import signal

import pytest

from bdpo_pl.errors import InputError
from bdpo_pl.files import RunFolder


def _hold(folder, held, done):
    with RunFolder(folder):
        held.set()
        done.wait(60)


def test_two_runs_cannot_write_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", held, done))
    other.start()
    assert held.wait(60)
    with pytest.raises(InputError, match=r"another run is writing the folder .*run;"), RunFolder(tmp_path / "run"):
        pass
    # Its end, even by force, lets the next one in.
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with RunFolder(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"run folder .*file cannot be written"), RunFolder(tmp_path / "file"):
        pass

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", deny)
    with pytest.raises(InputError, match=r"\(Permission denied\); set trainer\.logger"), RunFolder(tmp_path / "run"):
        pass


def test_run_that_writes_nothing_leaves_nothing(tmp_path):
    with RunFolder(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())
