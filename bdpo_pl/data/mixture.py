"""Sources of pairs: training pairs of several sources, each repeated according to its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from bdpo_pl.data.consistency import contradictions
from bdpo_pl.data.report import DUPLICATE_IN_SOURCES, LABELS_DIFFER, DataReport
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError


@dataclass
class DataSource:
    """One of several sources of pairs.

    Args:
        source: file, folder or hub dataset, as in `data.train`.
        weight: number of times that each of its pairs occurs in an epoch: 2 takes each twice, 0.5 half of them, drawn
            by `data.seed`.
        split: split of a hub dataset. Default: `data.split`.
        revision: git revision of a hub dataset. Default: `data.revision`.
        subset: configuration of a hub dataset that has several. Default: `data.subset`.
        limit: maximum number of its pairs that are used, drawn by `data.seed`. Default: all.

    Raises:
        InputError: the weight is not a positive number, the limit is below 1, or the source is a list or mapping that
            was not understood.
    """

    source: str
    weight: float = 1.0
    split: str | None = None
    revision: str | None = None
    subset: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        # The command line takes a list or mapping with an unknown name in it for text.
        if self.source.lstrip().startswith(("[", "{")) and not Path(self.source).exists():
            raise InputError(
                f"sources of pairs are not understood: {self.source}; write [{{source: a.jsonl, weight: 2}}, "
                f"{{source: b.jsonl}}], each with {', '.join(field.name for field in fields(self))} and nothing else"
            )
        if not 0.0 < self.weight < math.inf:
            raise InputError(f"the weight of {self.source} must be above 0, got {self.weight}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"the limit of {self.source} must be at least 1 pair, got {self.limit}")

    def __str__(self) -> str:
        said = [f"weight {self.weight:g}"] if self.weight != 1.0 else []
        said += [f"at most {self.limit:,} pairs"] if self.limit is not None else []
        return f"{self.source} ({', '.join(said)})" if said else self.source


def limited(table: PairTable, limit: int | None, seed: int, report: DataReport) -> PairTable:
    """Return at most `limit` pairs of `table`, drawn by `seed`, in the same order; the others are counted."""
    if limit is None or len(table) <= limit:
        return table
    report.note("left out by the limit of the source", len(table) - limit)
    table = table.select(np.sort(np.random.default_rng(seed).choice(len(table), limit, replace=False)))
    report.describe(table)
    return table


def join(
    tables: Sequence[PairTable], weights: Sequence[float], reports: Sequence[DataReport], duplicates: str
) -> tuple[PairTable, np.ndarray]:
    """Return the pairs of all `tables` in one table, and the weight of each pair.

    Args:
        tables: pairs of each source.
        weights: weight of each source.
        reports: report of each source. A pair that also occurs in an earlier source is counted in its own source's
            report, and so is one that a pair of any source contradicts.
        duplicates: treatment of such pairs: leave out (`drop`) or `keep`.

    Raises:
        InputError: some sources are read with the chat template, and others as plain text.
    """
    for report in reports:
        if bool(report.templated) is not bool(reports[0].templated):
            raise InputError(
                f"{report.source}: its rows are read as plain text and those of {reports[0].source} with the chat "
                "template, or the other way round; bring them into one form, or set data.dialogues"
            )
    first: dict[bytes, tuple[int, int]] = {}
    kept: list[PairTable] = []
    for number, (table, report) in enumerate(zip(tables, reports, strict=True)):
        found = [first.setdefault(digest, (number, i)) for i, digest in enumerate(table.pair_digests())]
        if duplicates == "drop":
            is_new, differ = np.ones(len(table), dtype=bool), 0
            for i, (source, at) in enumerate(found):
                if source != number:
                    report.drop(DUPLICATE_IN_SOURCES, table.places[i])
                    is_new[i] = False
                    differ += table.labels_differ(i, tables[source], at)
            report.note(f"{LABELS_DIFFER} (of another source)", differ)
            table = table.select(np.flatnonzero(is_new))
        kept.append(table)
    joined = PairTable.concatenate(kept)
    sources = np.repeat(np.arange(len(kept)), [len(table) for table in kept])
    contradicted = np.bincount(sources[[match.at for match in contradictions(joined).all()]], minlength=len(kept))
    for table, report, count in zip(kept, reports, contradicted.tolist(), strict=True):
        report.describe(table, count)
    return joined, np.array(weights, dtype=np.float64)[sources]


def repeat(table: PairTable, weights: np.ndarray, seed: int, of: str = "data.train") -> PairTable:
    """Return `table` with each pair repeated by its weight, as in `occurrences`."""
    return table if np.all(weights == 1.0) else table.select(occurrences(table, weights, seed, of))


def occurrences(table: PairTable, weights: np.ndarray, seed: int, of: str = "data.train") -> np.ndarray:
    """Return the indices of the pairs of `table`, each repeated by its weight, fractions drawn by `seed`, in order.

    The fraction gives a number of each file's pairs, exact but for rounding, not a chance for each pair.

    Raises:
        InputError: the weights leave no pair; `of` names what they are of.
    """
    if np.all(weights == 1.0):
        return np.arange(len(table))
    whole = np.floor(weights)
    times = whole.astype(np.int64)
    generator = np.random.default_rng(seed)
    by_file: dict[tuple[float, str], list[int]] = {}
    for i, (weight, place) in enumerate(zip(weights.tolist(), table.places, strict=True)):
        by_file.setdefault((weight, place.rpartition(", ")[0]), []).append(i)
    done: dict[float, tuple[int, int]] = {}
    for (weight, _), places in sorted(by_file.items(), key=lambda item: item[0][0]):
        # Rounded along the files, so that many small ones do not add up their rounding.
        pairs, drawn = done.get(weight, (0, 0))
        pairs += len(places)
        extra = round((weight - math.floor(weight)) * pairs) - drawn
        times[generator.permutation(np.array(places))[:extra]] += 1
        done[weight] = pairs, drawn + extra
    if not times.any():
        raise InputError(f"{of}: the weights leave no pair; raise them")
    return np.repeat(np.arange(len(table)), times)
