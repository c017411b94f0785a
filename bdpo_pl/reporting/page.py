"""The page that contains a report's sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from bdpo_pl.files import write_whole
from bdpo_pl.reporting.elements import Figure, Finding, Table
from bdpo_pl.reporting.templates import TEMPLATES, element


class Section:
    """A part of a page: a heading, and texts, tables and figures in the order in which they are added."""

    def __init__(self, title: str, text: str = "") -> None:
        self.title = title
        self.parts: list[Markup | Table | Figure] = []
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(element("paragraph", text))

    def items(self, texts: Sequence[str]) -> None:
        """Add a list."""
        self.parts.append(element("items", texts))

    def links(self, targets: Mapping[str, str]) -> None:
        """Add a list of links: text by target, a path relative to the page."""
        self.items([element("link", quote(target), text) for target, text in targets.items()])

    def quote(self, label: str, text: str) -> None:
        """Add a text of the data, with its line breaks."""
        self.parts.append(element("quote", label, text))

    def folded(self, title: str, texts: Mapping[str, str]) -> None:
        """Add texts of the data, by label, that are hidden until the reader unfolds them, and not printed on paper."""
        self.parts.append(element("folded", title, texts))

    def table(self, table: Table) -> None:
        """Add a table."""
        self.parts.append(table)

    def figure(self, figure: Figure) -> None:
        """Add a plot."""
        self.parts.append(figure)


class Page:
    """A report in one file.

    Args:
        title: title of the page.
        subtitle: one sentence below the title.
        facts: description of what was measured, by name.
    """

    def __init__(self, title: str, subtitle: str = "", facts: Mapping[str, str] | None = None) -> None:
        self.title = title
        self.subtitle = subtitle
        self.facts = dict(facts or {})
        self.warnings: list[str] = []
        self.headlines: list[tuple[str, str]] = []
        self.found: list[Finding] = []
        self.sections: list[Section] = []

    def warn(self, text: str) -> None:
        """Add a warning above everything else, for example of harmful texts in the file."""
        self.warnings.append(text)

    def headline(self, value: str, label: str) -> None:
        """Add a number in large type near the top."""
        self.headlines.append((value, label))

    def findings(self, findings: Sequence[Finding]) -> None:
        """Add findings before the sections, in the given order."""
        self.found.extend(findings)

    def section(self, title: str, text: str = "") -> Section:
        """Begin a section."""
        self.sections.append(Section(title, text))
        return self.sections[-1]

    def render(self) -> str:
        """Return the page as HTML."""
        return TEMPLATES.get_template("page.html").render(
            page=self, written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        )

    def write(self, path: Path) -> Path:
        """Write the page, and create its folder if necessary."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.render())
        return path
