"""Where tables and errors are printed."""

from __future__ import annotations

from rich.console import Console

# A log file has no width of its own, and 80 columns break the paths in it.
_LOG_WIDTH = 120


def get_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for tables where there is none."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, _LOG_WIDTH))
