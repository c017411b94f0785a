"""Held-out sets by name. The first is the monitored one: its split is `held_out`, as if it were the only set.

The split of another set is `held_out/NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from bdpo_pl.data.mixture import DataSource
from bdpo_pl.errors import InputError

HELD_OUT = "held_out"
"""Split of the only held-out set, or of the first of several."""

HeldOut = str | dict[str, str | DataSource] | None
"""Type of the option `data.held_out`."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def held_out_sources(given: HeldOut) -> dict[str, DataSource]:
    """Return the source of each held-out set by its name; the name of a single source is "".

    Raises:
        InputError: no set, a name that no metric can have, or a weight above 1.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        return {"": DataSource(given)}
    if not given:
        raise InputError("data.held_out: no set is named; write '{name: file}', or leave it out")
    sources = {name: source if isinstance(source, DataSource) else DataSource(source) for name, source in given.items()}
    for name, source in sources.items():
        if not _NAME.fullmatch(name):
            raise InputError(
                f"data.held_out: a set is named {name!r}; its metrics are called {HELD_OUT}/NAME/…, so a name has "
                "letters, digits, '_' and '-' only"
            )
        if source.weight > 1.0:
            raise InputError(
                f"data.held_out: the weight of {name} is {source.weight:g}; a held-out pair is measured once, because "
                "repeated ones would make intervals look narrower. Give a weight of at most 1"
            )
    return sources


def split_names(names: Iterable[str]) -> list[str]:
    """Return the split of each held-out set, in order."""
    return [HELD_OUT if i == 0 else f"{HELD_OUT}/{name}" for i, name in enumerate(names)]


def called(split: str, train: str = "training", held_out: str = "held-out") -> str:
    """Return the name of a split in reports: one of the two words, followed by the name of a further set."""
    first, _, name = split.partition("/")
    return {"train": train, HELD_OUT: held_out}[first] + (f" ({name})" if name else "")


def further_sets(metrics: Mapping[str, object] | Iterable[str], monitored: str) -> list[str]:
    """Return the names of the held-out sets, except the monitored one, that `metrics` are named after."""
    found = dict.fromkeys(name.split("/")[1] for name in metrics if re.fullmatch(rf"{HELD_OUT}/[^/]+/[^/]+", name))
    return [name for name in found if name != monitored]
