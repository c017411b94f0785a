"""Results of a benchmark, written to a file with the command, the date and the machine."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(
    folder: Path, stem: str, module: str, started: datetime.datetime, machine: Mapping[str, Any], rows: Sequence[Any]
) -> Path:
    """Write the rows of a result and return the file.

    Args:
        folder: folder of the results.
        stem: name of the file without its date.
        module: module that was run, whose arguments are those of this process.
        started: begin of the measurement.
        machine: machine of the measurement, from `benchmarks.machine`.
        rows: what was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{started:%Y-%m-%d}-{stem}.json"
    report = {
        "command": command_line(module),
        "date": f"{started:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine,
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def command_line(module: str, arguments: Sequence[str] | None = None) -> list[str]:
    """Return the command as a result keeps it: of files the names alone, as their folders say nothing to anyone else.

    Args:
        module: module that was run.
        arguments: its arguments; default: those of this process.
    """
    return ["python", "-m", module, *map(_bare, sys.argv[1:] if arguments is None else arguments)]


def _bare(word: str) -> str:
    """Return an argument without the folder of a file that it names."""
    name, equals, path = word.rpartition("=")
    return f"{name}{equals}{Path(path).name if '/' in path else path}"
