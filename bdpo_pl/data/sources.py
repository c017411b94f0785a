"""Raw records of a data source, each with its origin.

A source is a file (JSON Lines, JSON array, CSV, Parquet, or plain text with one prompt per line, gzipped or not), a
folder of them, a folder written by `Dataset.save_to_disk`, or the name of a dataset on the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdpo_pl.data.class_labels import class_names, with_names
from bdpo_pl.data.files import READERS, list_folder, read_file, suffix_of
from bdpo_pl.errors import InputError

FILE_SUFFIXES = tuple(READERS)
_LINES = (".jsonl", ".ndjson", ".csv", ".txt")


@dataclass(frozen=True)
class Record:
    """One row of a source, before its schema is known.

    Attributes:
        source: file path or dataset name.
        number: line of a text file with one row a line, counted from 1; row of anything else, counted from 0.
        fields: values by column name.
    """

    source: str
    number: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """Place of the record, for messages."""
        unit = "line" if suffix_of(self.source) in _LINES else "row"
        return f"{self.source}, {unit} {self.number}"


def read_records(
    source: str,
    split: str = "train",
    revision: str | None = None,
    subset: str | None = None,
    on_unread: Callable[[str], None] | None = None,
) -> Iterator[Record]:
    """Return the records of `source`, in order.

    Args:
        source: a file (`FILE_SUFFIXES`, each also with `.gz`); a folder of such files (read in name order) or one
            written by `Dataset.save_to_disk`; otherwise a dataset name on the Hugging Face hub.
        split: split of a hub dataset or of a saved `DatasetDict`; files have none.
        revision: git revision of a hub dataset; pin it to make a run repeatable.
        subset: configuration of a hub dataset that has several.
        on_unread: callback that gets the name of every unread entry of a folder.

    Raises:
        InputError: nothing readable is there, or a row is malformed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            yield from _saved_dataset(path, split)
            return
        files = list_folder(path, on_unread)
        if not files:
            raise InputError(f"{source}: the folder holds no {', '.join(FILE_SUFFIXES)} file")
        for file in files:
            yield from _file(file)
    elif path.exists() or path.is_symlink():
        yield from _file(path)
    elif suffix_of(path) in FILE_SUFFIXES or source.startswith(("/", ".", "~")):
        raise InputError(f"{source}: no such file or folder (looked from {Path.cwd()})")
    elif "/" not in source and path.suffix[1:].isalpha():
        raise InputError(
            f"{source}: no such file (looked from {Path.cwd()}), and its kind is not read; "
            f"give {', '.join(FILE_SUFFIXES)}, or OWNER/NAME of a dataset on the hub"
        )
    else:
        yield from _hub_dataset(source, split, revision, subset)


def _file(path: Path) -> Iterator[Record]:
    for number, fields in read_file(path):
        yield Record(str(path), number, fields)


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
    yield from _rows(str(path), data)


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
    except Exception as error:  # the hub client raises many kinds; each means that the dataset cannot be loaded
        raise InputError(
            f"{name}: neither a file here nor a dataset that could be loaded from the Hugging Face hub "
            f"(split {split!r}, revision {revision or 'newest'}): {type(error).__name__}: {error}"
        ) from error
    yield from _rows(name, data)


def _rows(name: str, data: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    names = class_names(getattr(data, "features", {}))
    for number, fields in enumerate(data):
        yield Record(name, number, with_names(fields, names))
