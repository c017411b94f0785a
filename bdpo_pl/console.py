"""Where tables and errors are printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

# A log file has no width of its own, and 80 columns break the paths in it.
_LOG_WIDTH = 120


def get_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for tables where there is none."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, _LOG_WIDTH))


def paths_table(paths: Mapping[str, Path]) -> Table:
    """Where the run's files are, those that exist."""
    table = Table(title="Written", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for what, path in paths.items():
        if path.exists():
            table.add_row(what, str(path))
    return table
