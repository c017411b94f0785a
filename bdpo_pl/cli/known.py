"""The names of all options, written down, so that a typo is seen without importing what has the options.

`python -m bdpo_pl.cli.write_known` writes them down again where an option was added; a test compares them with the
parsers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("known.json")


def read() -> dict[str, Any]:
    """Command → `options` (names without dashes) and `open` (options below which names are not known); and `losses`."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))
