"""Files that are whole or not there, and who may write the folder of a run."""

import errno
import multiprocessing
import os
import signal

import pytest

from bdpo_pl.errors import InputError
from bdpo_pl.files import RunFolder, write_whole, write_whole_folder


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

    monkeypatch.setattr("tempfile.TemporaryFile", deny)
    with pytest.raises(InputError, match=r"\(Permission denied\); set trainer\.logger"), RunFolder(tmp_path / "run"):
        pass


def test_run_that_writes_nothing_leaves_nothing(tmp_path):
    with RunFolder(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("content", ["ä", "ä".encode(), lambda file: file.write("ä".encode())])
def test_file_is_replaced_whole(tmp_path, shared, content):
    path = tmp_path / "file"
    path.write_text("before")
    assert write_whole(path, content, shared=shared) == path
    assert path.read_bytes() == "ä".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_file_that_cannot_be_completed_keeps_its_old_contents(tmp_path, monkeypatch, shared, error):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(handle):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_whole(path, "after", shared=shared)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_permissions_are_the_users_own_choice_or_private(tmp_path):
    before = os.umask(0o022)
    try:
        modes = {
            (shared, private): write_whole(tmp_path / "f", "x", shared=shared, private=private).stat().st_mode & 0o777
            for shared in (False, True)
            for private in (False, True)
        }
    finally:
        os.umask(before)
    assert modes == {(s, p): 0o600 if p else 0o644 for s in (False, True) for p in (False, True)}


def test_folder_appears_when_it_is_complete(tmp_path):
    def fill(partial):
        partial.mkdir()
        (partial / "file").touch()
        assert not (tmp_path / "folder").exists()

    def stop(partial):
        fill(partial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole_folder(tmp_path / "folder", stop)
    assert not list(tmp_path.iterdir())
    write_whole_folder(tmp_path / "folder", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
