"""Markdown pages from Jinja templates: prose in the template, numbers and tables from Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, **values: Any) -> str:
    """Render the page of `template` with `values`.

    Omitted parts leave blank lines behind; several in a row become one.

    Raises:
        jinja2.UndefinedError: the template names a value that was not given.
    """
    environment = jinja2.Environment(  # noqa: S701 - Markdown, not HTML
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    text = environment.from_string(template.read_text(encoding="utf-8")).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
