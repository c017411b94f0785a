"""Files and folders that are either complete or absent, and a run folder that only one process may write."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from filelock import FileLock, Timeout

from bdpo_pl.errors import InputError


def write_whole(
    path: Path,
    content: str | bytes | Callable[[IO[bytes]], None],
    *,
    shared: bool = False,
    private: bool = False,
    keep_mode: bool = False,
) -> Path:
    """Write `content` to the file `path`, all or nothing, and force it to disk.

    The bytes are written under another name in the same folder, which must exist. That name is then changed to `path`,
    which an operating system does atomically.

    Args:
        path: Path of the file, whose former contents remain until the new ones are complete.
        content: Text (written as UTF-8), bytes, or a function that writes to the open file.
        shared: True if several processes may write this file at once, so that each needs its own temporary name.
            Otherwise the name is fixed, and the next process overwrites what a killed process has left.
        private: True to make the file readable only by its owner.
        keep_mode: True to keep the permissions of the file at `path`, which exists.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    if shared:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        os.close(handle)
        temporary = Path(name)
    else:
        temporary = path.with_name(f".{path.name}.partial")
    mode = stat.S_IMODE(path.stat().st_mode) if keep_mode else 0o600 if private else 0o666 & ~_umask()
    try:
        with temporary.open("wb") as file:
            temporary.chmod(mode)
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def free_folder(folder: Path) -> Path:
    """Return `folder`, or the next free name beside it (`folder`-2, `folder`-3, …) if it exists."""
    number = 1
    free = folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def write_whole_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have `write` fill a folder under a temporary name, and rename it when it is complete.

    Args:
        folder: Path of the folder, which must not exist yet.
        write: Function that is called with the folder to fill, which it may have to create.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


class RunFolder:
    """A context manager that holds `folder` for this process, and releases it when the process ends for any reason.

    Lightning's logger names the folder (`version_0`, `version_1`, …); `cli/job.py` configures the logger.

    Args:
        folder: Folder to hold, created if it does not exist.
        options: Options that would select another folder, for messages.

    Raises:
        InputError: On entering, another run holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, options: str = "trainer.logger.init_args.save_dir, name or version") -> None:
        self.folder = folder
        self.options = options
        self._lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)

    def __enter__(self) -> RunFolder:
        try:
            try_writing(self.folder)
            self._lock.acquire()
        except Timeout:
            raise InputError(
                f"another run is writing the folder {self.folder}; wait for its end, or give this run a folder of its "
                f"own with {self.options}"
            ) from None
        except OSError as error:
            raise InputError(
                f"the run folder {self.folder} cannot be written ({error.strerror}); set {self.options} to one that can"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that failed before it wrote anything leaves no folder.
        with suppress(OSError):
            self.folder.rmdir()
        with suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def try_writing(folder: Path) -> None:
    """Create `folder` if it does not exist, and try to write to it without leaving a file.

    Raises:
        OSError: The folder cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def writable_folder(path: str | Path, option: str) -> Path:
    """Create the folder at `path` now, so that one that cannot be written is reported before the work, not after.

    Raises:
        InputError: The folder cannot be created or written; the message names `option`.
    """
    folder = Path(path).expanduser()
    try:
        try_writing(folder)
    except OSError as error:
        raise InputError(
            f"the report cannot be written to {folder} ({error.strerror}); set {option} to a folder that can"
        ) from None
    return folder


def writable_file(path: str | Path | None, option: str) -> Path | None:
    """Return where the file of `option` will be, in a folder that is created now; None if `path` is None.

    Raises:
        InputError: The folder cannot be created or written, or `path` is a folder; the message names `option`.
    """
    if path is None:
        return None
    file = Path(path).expanduser()
    try:
        try_writing(file.parent)
    except OSError as error:
        raise InputError(f"{option}: {file} cannot be written ({error.strerror}); name another file") from None
    if file.is_dir():
        raise InputError(f"{option}: {file} is a folder; name a file")
    return file


def _umask() -> int:
    # The mask can be read only by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        # Windows cannot open a folder.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
