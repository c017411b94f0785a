"""Templates of the HTML pages. Every text is data: it is escaped, and its control characters are made visible."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bdpo_pl.console import printable


def _visible(value: object) -> object:
    """Escape the control characters of texts, and of markup that holds texts; other values remain."""
    if isinstance(value, Markup):
        return Markup(printable(value))  # noqa: S704 - was markup before; escapes like \x1b hold nothing to interpret
    return printable(value) if isinstance(value, str) else value


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    finalize=_visible,
)


def element(macro: str, *values: object) -> Markup:
    """Return the markup of one element: the macro of that name in `elements.html`, for `values`."""
    return Markup(getattr(TEMPLATES.get_template("elements.html").module, macro)(*values))  # noqa: S704 - a template's
