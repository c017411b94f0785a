"""Rows that a person labels or completes, saved after each answer."""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from bdpo_pl.errors import InputError
from bdpo_pl.files import write_whole

Kind = Literal["label", "chosen"]
LABELS = ("refusal", "compliance")


class InUseError(InputError):
    """Another process holds the file."""


class ReviewFile:
    """A JSONL file whose rows get a `label` or a `chosen`.

    Args:
        path: path of the file.

    Attributes:
        kind: field that the rows get, `label` or `chosen`.
        rows: rows of the file, with all their fields.

    Raises:
        InputError: the file cannot be read, or its rows are of neither kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.rows, self._digest = _read(path)
        if all(isinstance(row.get("response"), str) for row in self.rows):
            self.kind: Kind = "label"
        elif all(isinstance(row.get("rejected"), str) for row in self.rows):
            self.kind = "chosen"
        else:
            raise InputError(
                f"{path}: every row needs prompt and response, to be labelled, or prompt and rejected, to get a chosen "
                "response"
            )

    @property
    def left(self) -> int:
        """Number of rows that have no answer yet."""
        return sum(not row.get(self.kind) for row in self.rows)

    def answer(self, index: int, value: str | None) -> None:
        """Set the answer of a row (None removes it), and save the file, whole or not at all.

        Raises:
            InputError: there is no such row, the answer is not valid, or the file was changed by something else or
                cannot be written.
        """
        if not 0 <= index < len(self.rows):
            raise InputError(f"there is no row {index}")
        if value is not None and (not value.strip() or (self.kind == "label" and value not in LABELS)):
            raise InputError(f"that is not a valid {self.kind}")
        if value is not None and re.search("[\ud800-\udfff]", value):
            raise InputError("the answer has half a character (a lone surrogate); delete that and type it again")
        if self.kind == "chosen" and value == self.rows[index]["rejected"]:
            raise InputError("the chosen response is the rejected one")
        with self._lock:
            rows = [*self.rows]
            rows[index] = {**rows[index], self.kind: value}
            content = b"".join(map(_line, rows))
            try:
                if _digest_of(self.path.read_bytes()) != self._digest:
                    raise InputError(
                        f"{self.path} was changed by something else since it was read, and saving would undo that; "
                        "copy your text, end bdpo review with Ctrl-C, and start it again"
                    )
                # Answers to label are readable only by their owner, and stay so.
                write_whole(self.path.resolve(), content, keep_mode=True)
            except OSError as error:
                raise InputError(f"{self.path} cannot be written: {error.strerror}") from error
            self.rows, self._digest = rows, _digest_of(content)


@contextmanager
def reviewing(path: Path) -> Iterator[ReviewFile]:
    """Read the rows of `path`, and hold the file for this process: another one would overwrite the answers of this one.

    Raises:
        InputError: another process holds it, its folder cannot be written, or it has no such rows.
    """
    ReviewFile(path)
    with held(path):
        # Read again: until the lock was there, another process may have saved an answer.
        yield ReviewFile(path)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the file at `path`, which need not exist, so that no other process that holds it writes it.

    Raises:
        InUseError: another process holds it.
        InputError: its folder cannot be written.
    """
    lock = FileLock(path.resolve().with_name(f".{path.resolve().name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InUseError(f"{path} is open in another bdpo review; end that one first") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _read(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Return the rows of the file, and the digest of its bytes."""
    rows = []
    try:
        content = path.read_bytes()
        lines = io.StringIO(content.decode(), newline=None)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise InputError(f"{path}, line {number}: a row needs a text in prompt")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows, _digest_of(content)


def _line(row: dict[str, Any]) -> bytes:
    """Return the row as a line of JSON, escaped if a text of it has no UTF-8."""
    try:
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(row)}\n".encode()


def _digest_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
