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
        # Of files the names alone: where they lie says nothing to anyone else.
        "command": ["python", "-m", module, *map(_bare, sys.argv[1:])],
        "date": f"{started:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine,
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def _bare(word: str) -> str:
    """Return an argument without the folder of a file that it names."""
    name, equals, path = word.rpartition("=")
    return f"{name}{equals}{Path(path).name if '/' in path else path}"
