"""Files of rows: JSON Lines, JSON arrays, CSV, Parquet and plain text, uncompressed or gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from bdpo_pl.errors import InputError

MAX_LINE = 64 * 2**20
"""Maximum bytes in a line of a text file: a longer line is not a row, and would fill the memory before that is seen."""
MAX_JSON = 2 * 2**30
"""Maximum bytes in a `.json` file, which is read whole."""

Rows = Iterator[tuple[int, dict[str, Any]]]
"""Pairs of (number of the line or row, its fields)."""


@lru_cache(maxsize=1024)
def suffix_of(path: Path | str) -> str:
    """Return the suffix that determines how `path` is read, in lower case and without `.gz`."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def is_readable_name(path: Path) -> bool:
    """Return true if a file of this name is read."""
    return suffix_of(path) in READERS and not path.name.startswith(".")


def list_folder(folder: Path, on_unread: Callable[[str], None] | None = None) -> list[Path]:
    """Return the readable files of `folder`, in name order.

    Args:
        folder: an existing folder.
        on_unread: callback that gets the name of every other entry of the folder.
    """
    files = []
    for path in sorted(folder.iterdir()):
        if is_readable_name(path):
            files.append(path)
        elif on_unread is not None:
            on_unread(path.name + ("/" if path.is_dir() else ""))
    return files


def require_file(path: Path) -> None:
    """Raise `InputError` unless `path` is a regular file: reading anything else may block for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        kind = "a link that leads nowhere or to itself" if path.is_symlink() else "not readable"
        raise InputError(f"{path}: {kind} ({error.strerror}); correct or remove it") from None
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder, though its name is a file's",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    raise InputError(f"{path}: {kinds.get(stat.S_IFMT(mode), 'no regular file')}; give a regular file")


def read_file(path: Path) -> Rows:
    """Return the rows of a file according to its suffix.

    Raises:
        InputError: the file cannot be read, or its content does not match its suffix.
    """
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise InputError(
            f"{path}: cannot read {path.suffix or 'a file with no suffix'}; give {', '.join(READERS)} (or one of them "
            "with .gz)"
        )
    require_file(path)
    try:
        yield from reader(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise InputError(
                    f"{path}, line {number}: longer than {MAX_LINE // 2**20} MiB, which is not a row; is the file "
                    "whole, with one row on each line?"
                )
            yield number, line


def _jsonl(path: Path) -> Rows:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            # utf-8-sig: a byte order mark at the head of the file is not part of the first row.
            fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_once)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: not JSON in UTF-8 ({error}); correct or remove the line"
            ) from None
        except _TwiceError as error:
            raise InputError(f"{path}, line {number}: the key {error} is there twice; remove one") from None
        except ValueError:
            raise InputError(f"{path}, line {number}: {_TOO_MANY_DIGITS}") from None
        if not isinstance(fields, dict):
            hint = "; a file that is one JSON array is read as .json" if isinstance(fields, list) else ""
            raise InputError(f"{path}, line {number}: expected a JSON object, got {type(fields).__name__}{hint}")
        yield number, fields


def _json(path: Path) -> Rows:
    """Yield the rows of a JSON array, or of the only array in a JSON object."""
    with _open(path) as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise InputError(f"{path}: larger than {MAX_JSON // 2**30} GiB, and a .json file is read whole; give .jsonl")
    try:
        rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        first = content.lstrip()[:1]
        hint = "; rows of one JSON object a line belong into a .jsonl file" if first == b"{" else ""
        raise InputError(f"{path}: not JSON in UTF-8 ({error}){hint}") from None
    except _TwiceError as error:
        raise InputError(f"{path}: the key {error} is twice in one object; remove one") from None
    except ValueError:
        too_long = object()
        limit = sys.get_int_max_str_digits()
        text = content.decode("utf-8-sig")
        read = _array(json.loads(text, parse_int=lambda digits: too_long if len(digits.lstrip("-")) > limit else 0))
        # A file that is only a number has no rows.
        found = (i for i, fields in enumerate(read if isinstance(read, list) else []) if _holds(fields, too_long))
        raise InputError(f"{path}, row {next(found, 0)}: {_TOO_MANY_DIGITS}") from None
    rows = _array(rows)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON array of objects, got {type(rows).__name__}")
    for number, fields in enumerate(rows):
        if not isinstance(fields, dict):
            raise InputError(f"{path}, row {number}: expected a JSON object, got {type(fields).__name__}")
        yield number, fields


def _array(content: object) -> Any:
    """Return the only array in a JSON object, else the object as the only row; anything else unchanged."""
    if not isinstance(content, dict):
        return content
    arrays = [value for value in content.values() if isinstance(value, list) and value]
    return arrays[0] if len(arrays) == 1 else [content]


_TOO_MANY_DIGITS = "a whole number has more digits than Python reads; write it as text, or remove the row"


def _holds(value: object, wanted: object) -> bool:
    if isinstance(value, dict | list):
        return any(_holds(item, wanted) for item in (value.values() if isinstance(value, dict) else value))
    return value is wanted


class _TwiceError(ValueError):
    """A duplicate key in a JSON object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return fields


def _csv(path: Path) -> Rows:
    def decoded() -> Iterator[str]:
        for number, line in _lines(path):
            try:
                # Spreadsheets begin a file with a byte order mark, which is not part of the first column's name.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path}, line {number}: not UTF-8; save the file as CSV in UTF-8") from None

    reader = csv.reader(decoded(), strict=True)
    csv.field_size_limit(MAX_LINE)
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise InputError(f"{path}: two columns of the same name among {', '.join(header)}; rename one")
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{path}, line {line}: {len(row)} fields under {len(header)} columns; put a field that holds "
                    "a comma or a line break in double quotes"
                )
            if row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1  # a quoted field may run over several lines
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not CSV ({error}); correct the quotes, or save it again") from None


def _txt(path: Path) -> Rows:
    """Yield one prompt per line."""
    for number, line in _lines(path):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}: not UTF-8; save the file in UTF-8") from None
        if text:
            yield number, {"prompt": text}


def _parquet(path: Path) -> Rows:
    source: Any = path
    if path.suffix.lower() == ".gz":
        with _open(path) as packed:
            source = io.BytesIO(packed.read())
    try:
        file = pq.ParquetFile(source)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                yield number, fields
                number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: of damaged text and dates
        raise InputError(f"{path}: not a whole Parquet file ({error}); fetch or write it again") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
"""Reader of a file, by its suffix."""
