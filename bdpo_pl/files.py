"""The folder of a run: that it can be written, and that no other run writes it."""

from __future__ import annotations

import fcntl
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from bdpo_pl.errors import InputError


class RunFolder:
    """A context manager that holds `folder` for this process, which gives it up when it ends, however it ends.

    Args:
        folder: made if it is not there.
        options: those that would name another folder, for messages.

    Raises:
        InputError: on entering, if another run holds it or it cannot be written.
    """

    def __init__(self, folder: Path, options: str = "trainer.logger.init_args.save_dir, name or version") -> None:
        self.folder = folder
        self.options = options
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        probe = self.folder / ".writable"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
            lock = self.folder.with_name(f".{self.folder.name}.lock").open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"the run folder {self.folder} cannot be written ({error.strerror}); set {self.options} to one that can"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise InputError(
                f"another run is writing the folder {self.folder}; wait for its end, or give this run a folder of its "
                f"own with {self.options}"
            ) from None
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        # A run that failed before it wrote anything leaves nothing.
        with suppress(OSError):
            self.folder.rmdir()
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()


def try_writing(folder: Path) -> None:
    """Make `folder` if it is not there, and write to it, leaving nothing.

    Raises:
        OSError: it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def writable_folder(path: str | Path, option: str) -> Path:
    """The folder at `path`, made now: one that cannot be written is found out before the work, not after.

    Raises:
        InputError: it cannot be made or written; the message names `option`.
    """
    folder = Path(path).expanduser()
    try:
        try_writing(folder)
    except OSError as error:
        raise InputError(
            f"the report cannot be written to {folder} ({error.strerror}); set {option} to a folder that can"
        ) from None
    return folder
