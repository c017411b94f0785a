"""Records of finished cells: a file with a line of JSON for each, to which a run that goes on adds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bdpo_pl.errors import InputError
from bdpo_pl.files import write_whole


def key_of(fields: Any) -> str:
    """Return the digest of a dataclass's fields, which identifies the cell that it describes."""
    return hashlib.sha256(json.dumps(asdict(fields), sort_keys=True).encode()).hexdigest()[:16]


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Read finished cells by key; a last line cut short by an interruption does not count.

    Raises:
        InputError: another line is not JSON.
    """
    if not path.exists():
        return {}
    return {record["key"]: record for _, record in _whole_lines(path) if "key" in record}


def read_heads(path: Path) -> list[dict[str, Any]]:
    """Read the lines that are no cells, one for each call of the study's command; errors as in `read_records`."""
    return [record for _, record in _whole_lines(path) if "command" in record] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line, on its own even after an incomplete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    if cut:
        whole = path.read_text(encoding="utf-8").splitlines()[:-1]
        write_whole(path, "".join(f"{text}\n" for text in whole))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def remove(path: Path, keys: set[str]) -> None:
    """Remove the records of some cells from a file; all other lines stay, except an incomplete last one.

    Raises:
        InputError: a line is not JSON, as in `read_records`.
    """
    kept = (line for line, record in _whole_lines(path) if record.get("key") not in keys)
    write_whole(path, "".join(f"{line}\n" for line in kept))


def differences(old: dict[str, Any], new: dict[str, Any], compared: Sequence[str]) -> list[str]:
    """Return the differences between two records of one cell, as `metrics.ability.all: 0.5 → 0.6`.

    Args:
        old: record of the file.
        new: record of a second run.
        compared: fields that are the same in every run on one machine.
    """
    before, after = (dict(_leaves({name: record.get(name) for name in compared})) for record in (old, new))
    return [
        f"{name}: {before.get(name)!r} → {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def compare_again(
    path: Path, key: str, run: Callable[[dict[str, Any]], dict[str, Any]], compared: Sequence[str]
) -> None:
    """Run the finished cell `key` of `path` again, and print in what the result differs.

    Args:
        path: path of the records.
        key: key of the cell.
        run: function that returns the record of a second run, given that of the first.
        compared: fields that are the same in every run on one machine.

    Raises:
        SystemExit: there is no such cell, or something differs.
    """
    old = read_records(path).get(key)
    if old is None:
        raise SystemExit(f"{path} holds no cell {key}; give the file with --out")
    found = differences(old, run(old), compared)
    print("\n".join(found) or f"{key}: the same to the last digit")
    if found:
        raise SystemExit(1)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number}: no JSON; remove the line, and its cell is run again"
                ) from None
