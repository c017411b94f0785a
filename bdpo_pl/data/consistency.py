"""Checks that preference pairs agree with each other, and that held-out pairs are really new.

All comparisons except `near_leaks` compare tokens, after template and truncation: the input of the model. Prompts are
also the same if they were before truncation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from bdpo_pl.data.table import PairTable

_NOT_A_WORD = re.compile(r"[\W_]+")


class Match(NamedTuple):
    """A pair and the first pair that it repeats or contradicts, both by index."""

    at: int
    other: int


class Contradictions(NamedTuple):
    """Pairs of one table that teach the opposite of another of its pairs under the same prompt.

    Attributes:
        swapped: pairs whose chosen response is the other's rejected one and vice versa.
        conflicting: pairs of which one response is chosen in one and rejected in the other, while the other responses
            differ; of single answers, those that another row labels otherwise.
    """

    swapped: list[Match]
    conflicting: list[Match]

    def all(self) -> list[Match]:
        """Return the contradictions of both kinds."""
        return self.swapped + self.conflicting


def repeats(keys: Sequence[bytes]) -> list[Match]:
    """Return every key that also occurs earlier, with its first index."""
    first: dict[bytes, int] = {}
    return [Match(i, j) for i, key in enumerate(keys) if (j := first.setdefault(key, i)) != i]


def first_of_prompt(table: PairTable) -> list[int]:
    """Return for each pair the index of the first pair that has the same prompt, directly or by way of others."""
    parents: list[int] = []
    first: dict[bytes, int] = {}

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    for i, keys in enumerate(table.prompt_keys()):
        parents.append(i)
        for key in keys:
            earlier, later = sorted((root(first.setdefault(key, i)), root(i)))
            parents[later] = earlier
    return [root(i) for i in range(len(parents))]


def contradictions(table: PairTable) -> Contradictions:
    """Return the contradictions of `table`; a swapped pair is not counted as conflicting as well."""
    prompts = first_of_prompt(table)
    chosen, rejected = table.response_digests()
    if table.desirable is not None:
        keys = list(zip(prompts, chosen, table.desirable.tolist(), strict=True))
        first: dict[tuple[int, bytes, bool], int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        others = [(i, first.get((prompt, answer, not label))) for i, (prompt, answer, label) in enumerate(keys)]
        return Contradictions([], [Match(i, other) for i, other in others if other is not None])
    pairs: dict[tuple[int, bytes, bytes], int] = {}
    as_chosen: dict[tuple[int, bytes], int] = {}
    as_rejected: dict[tuple[int, bytes], int] = {}
    for i, (x, good, bad) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        pairs.setdefault((x, good, bad), i)
        as_chosen.setdefault((x, good), i)
        as_rejected.setdefault((x, bad), i)
    swapped, conflicting = [], []
    for i, (x, good, bad) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        other = pairs.get((x, bad, good))
        partial = as_rejected.get((x, good), as_chosen.get((x, bad)))
        if other is not None:
            swapped.append(Match(i, other))
        elif partial is not None:
            conflicting.append(Match(i, partial))
    return Contradictions(swapped, conflicting)


def leaks(table: PairTable, held_out: PairTable) -> list[Match]:
    """Return the pairs of `held_out` whose prompt also occurs in `table`, each with the first such pair of `table`."""
    known: dict[bytes, int] = {}
    for i, keys in enumerate(table.prompt_keys()):
        for key in keys:
            known.setdefault(key, i)
    found = ([known[key] for key in keys if key in known] for keys in held_out.prompt_keys())
    return [Match(i, min(others)) for i, others in enumerate(found) if others]


def near_leaks(table: Sequence[str], held_out: Sequence[str]) -> list[Match]:
    """Return leaks of prompts as texts, compared without case, spacing and punctuation."""
    known: dict[str, int] = {}
    for i, text in enumerate(table):
        known.setdefault(_words(text), i)
    # A prompt of punctuation alone has no words to compare.
    return [Match(i, known[words]) for i, text in enumerate(held_out) if (words := _words(text)) and words in known]


def _words(text: str) -> str:
    return _NOT_A_WORD.sub(" ", text.casefold()).strip()


def count_shared_prompts(table: PairTable, other: PairTable) -> int:
    """Count the pairs of `other` whose prompt also occurs in `table`: a leak if one is held out from the other."""
    return len(leaks(table, other))
