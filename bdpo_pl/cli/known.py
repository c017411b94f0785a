"""Stored names of all options, so that a typo is found without importing the classes that define them.

`python -m bdpo_pl.cli.write_known` stores them again after an option was added; a test compares them with the parsers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("known.json")


def read() -> dict[str, Any]:
    """Read `options` (without dashes) and `open` (prefixes of unknown names) of each command, and `losses`."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))
