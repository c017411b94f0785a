"""Files and folders that are whole or not there, and the folder of a run that one process alone may write."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from filelock import FileLock, Timeout

from bdpo_pl.errors import InputError


def write_whole(
    path: Path, content: str | bytes | Callable[[IO[bytes]], None], *, shared: bool = False, private: bool = False
) -> Path:
    """Write `content` to the file `path`, all or nothing, and force it onto the disk.

    The bytes go to another name in the same folder, which must exist; that name is then changed to `path`, which an
    operating system does at once or not at all.

    Args:
        path: Its former contents stay until the new ones are complete.
        content: Text (written as UTF-8), bytes, or a function that writes to the open file.
        shared: Several processes may write this file at once, so each needs a temporary name of its own. Otherwise
            the name is fixed, and what a killed process has left is overwritten by the next.
        private: Readable by the file's owner alone.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    if shared:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        os.close(handle)
        temporary = Path(name)
    else:
        temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            temporary.chmod(0o600 if private else 0o666 & ~_umask())
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


def write_whole_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have `write` fill a folder under another name, and give it its own name when it is complete.

    Args:
        folder: Must not exist yet.
        write: Called with the folder to fill, which it may have to make.
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
    """A context manager that holds `folder` for this process, which gives it up when it ends, however it ends.

    Args:
        folder: Made if it is not there.
        options: Those that would name another folder, for messages.

    Raises:
        InputError: On entering, if another run holds it or it cannot be written.
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
        # A run that failed before it wrote anything leaves nothing.
        with suppress(OSError):
            self.folder.rmdir()
        with suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def try_writing(folder: Path) -> None:
    """Make `folder` if it is not there, and write to it, leaving nothing.

    Raises:
        OSError: It cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def writable_folder(path: str | Path, option: str) -> Path:
    """Make the folder at `path` now: one that cannot be written is found out before the work, not after.

    Raises:
        InputError: It cannot be made or written; the message names `option`.
    """
    folder = Path(path).expanduser()
    try:
        try_writing(folder)
    except OSError as error:
        raise InputError(
            f"the report cannot be written to {folder} ({error.strerror}); set {option} to a folder that can"
        ) from None
    return folder


def _umask() -> int:
    # It can be read only by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        # Windows opens no folder.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
