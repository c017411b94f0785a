"""Raw records of a data source, each with the place it came from.

A source is a JSONL or Parquet file, a folder of them, a folder written by `Dataset.save_to_disk`, or the name of a
dataset on the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bdpo_pl.errors import InputError

FILE_SUFFIXES = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Record:
    """One row of a source, before anything is known of its schema.

    Attributes:
        source: file path or dataset name.
        number: line of a JSONL or CSV file, counted from 1; row of anything else, counted from 0.
        fields: column name → value.
    """

    source: str
    number: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """Where the record stands, for messages."""
        unit = "line" if self.source.endswith((".jsonl", ".ndjson", ".csv")) else "row"
        return f"{self.source}, {unit} {self.number}"


def read_records(
    source: str, split: str = "train", revision: str | None = None, subset: str | None = None
) -> Iterator[Record]:
    """Records of `source`, in order.

    Args:
        source: a `.jsonl`, `.ndjson` or `.parquet` file; a folder of such files (read in name order) or one written by
            `Dataset.save_to_disk`; otherwise a dataset name on the Hugging Face hub.
        split: split of a hub dataset or of a saved `DatasetDict`; files have none.
        revision: git revision of a hub dataset; pin it to make a run repeatable.
        subset: which of a hub dataset's configurations, if it has several.

    Raises:
        InputError: nothing readable there, or a line that is not a JSON object.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            yield from _saved_dataset(path, split)
            return
        files = sorted(p for p in path.iterdir() if p.suffix in FILE_SUFFIXES)
        if not files:
            raise InputError(f"{source}: the folder holds no {', '.join(FILE_SUFFIXES)} file")
        for file in files:
            yield from _file(file)
    elif path.is_file():
        yield from _file(path)
    elif path.suffix in (*FILE_SUFFIXES, ".json", ".csv") or source.startswith(("/", ".", "~")):
        raise InputError(f"{source}: no such file or folder (looked from {Path.cwd()})")
    else:
        yield from _hub_dataset(source, split, revision, subset)


def _file(path: Path) -> Iterator[Record]:
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path)
    raise InputError(f"{path}: cannot read {path.suffix or 'a file with no suffix'}; give {', '.join(FILE_SUFFIXES)}")


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                # utf-8-sig: a byte order mark at the head of the file is not part of the first row.
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number}: not JSON in UTF-8 ({error}); mend or remove the line"
                ) from None
            if not isinstance(fields, dict):
                raise InputError(f"{path}, line {number}: expected a JSON object, got {type(fields).__name__}")
            yield Record(str(path), number, fields)


def _parquet(path: Path) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                yield Record(str(path), number, fields)
                number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: of damaged text and dates
        raise InputError(f"{path}: not a whole Parquet file ({error}); fetch or write it again") from None


def _saved_dataset(path: Path, split: str) -> Iterator[Record]:
    import datasets

    try:
        _require_inside(path)
        data = datasets.load_from_disk(str(path))
    except InputError:
        raise
    except Exception as error:  # of whatever kind: the folder is not what save_to_disk wrote
        raise InputError(
            f"{path}: not a whole saved dataset ({type(error).__name__}: {error}); write it again with save_to_disk"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise InputError(f"{path}: no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    for number, fields in enumerate(data):
        yield Record(str(path), number, dict(fields))


def _require_inside(path: Path) -> None:
    """Raise `InputError` if the dataset saved at `path` would read files from elsewhere."""
    for state in path.rglob("state.json"):
        for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
            name = entry["filename"]
            if Path(name).name != name or name in ("", ".", ".."):
                raise InputError(f"{state}: {name!r} names a file outside the folder; such a dataset is not read")


def _hub_dataset(name: str, split: str, revision: str | None, subset: str | None) -> Iterator[Record]:
    import datasets

    try:
        data = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # the hub client raises many kinds; each means that the dataset could not be had
        raise InputError(
            f"{name}: neither a file here nor a dataset that could be loaded from the Hugging Face hub "
            f"(split {split!r}, revision {revision or 'newest'}): {type(error).__name__}: {error}"
        ) from error
    for number, fields in enumerate(data):
        yield Record(name, number, dict(fields))
