"""Held-out sets by name. The first is the monitored one: its split is `held_out`, as if it were the only set.

The split of another set is `held_out/NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from bdpo_pl.data.mixture import DataSource
from bdpo_pl.errors import InputError

HELD_OUT = "held_out"
"""Split of the only held-out set, or of the first of several."""

HeldOut = str | DataSource | dict[str, str | DataSource] | None
"""Type of the option `data.held_out`. A mapping that is a source with options comes before one of names of sets."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def held_out_sources(given: HeldOut) -> dict[str, DataSource]:
    """Return the source of each held-out set by its name; the name of a single source is "".

    Raises:
        InputError: no set, a name that no metric can have, a weight above 1, or a list or mapping that was not
            understood.
    """
    if given is None:
        return {}
    names = [field.name for field in fields(DataSource)]
    # The command line takes a list, or a mapping with an unknown name in it, for text.
    is_text = isinstance(given, str) and given.lstrip().startswith(("[", "{")) and not Path(given).exists()
    if is_text or (isinstance(given, dict) and "source" in given and given.keys() <= {*names}):
        raise InputError(
            f"data.held_out is not understood: {given}; write '{{source: a.jsonl, limit: 500}}' for one set, or "
            "'{near: a.jsonl, far: {source: b.jsonl, limit: 500}}' for several by their names; each has "
            f"{', '.join(names)} and nothing else"
        )
    if isinstance(given, str | DataSource):
        return {"": _measured_once("", given)}
    if not given:
        raise InputError("data.held_out: no set is named; write '{name: file}', or leave it out")
    for name in given:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"data.held_out: a set is named {name!r}; its metrics are called {HELD_OUT}/NAME/…, so a name has "
                "letters, digits, '_' and '-' only"
            )
    return {name: _measured_once(name, source) for name, source in given.items()}


def _measured_once(name: str, given: str | DataSource) -> DataSource:
    """Return the source of a set.

    Raises:
        InputError: its weight is above 1.
    """
    source = given if isinstance(given, DataSource) else DataSource(given)
    if source.weight > 1.0:
        raise InputError(
            f"data.held_out: the weight of {name or source.source} is {source.weight:g}; a held-out pair is measured "
            "once, because repeated ones would make intervals look narrower. Give a weight of at most 1"
        )
    return source


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
