"""Console output: tables, and text that cannot control the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

# A log file has no width of its own, and 80 columns would break the paths in it.
_LOG_WIDTH = 120


def printable(text: str) -> str:
    """Return `text` with characters that would control a terminal, or cannot be displayed, escaped.

    Line breaks and tabs remain.

    Escaped are control characters (and so escape codes), marks that change the direction of writing, and lone
    surrogates. A zero-width joiner remains, because it is part of emoji and of many scripts.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in _OBEYED else _escape(c) for c in text)


_OBEYED = {"Cc", "Cf", "Cs"}


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


class _PlainConsole(Console):
    """A console on which text from data, models and services cannot control the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Escape the text of segments; rich's own codes are added later."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def get_console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal, or wide enough for tables if there is no terminal."""
    console = _PlainConsole(stderr=stderr)
    return console if console.is_terminal else _PlainConsole(stderr=stderr, width=max(console.width, _LOG_WIDTH))


def paths_table(paths: Mapping[str, Path]) -> Table:
    """Return a table of the run's files that exist."""
    table = Table(title="Written", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for what, path in paths.items():
        if path.exists():
            table.add_row(what, str(path))
    return table
