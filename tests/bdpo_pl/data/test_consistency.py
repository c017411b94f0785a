"""Repeats, contradictions and leaks, against a comparison of every pair with every other."""

import dataclasses

import numpy as np
import pytest

from bdpo_pl.data.consistency import Match, contradictions, first_of_prompt, leaks, near_leaks, repeats
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair

NULL = [1]


def table(*pairs):
    return PairTable.from_pairs([PreferencePair(list(p), list(w), list(r)) for p, w, r in pairs], NULL)


@pytest.mark.parametrize("seed", range(5))
def test_every_contradiction_is_found_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    # Few ids, so that pairs meet; lengths differ, so that boundaries matter.
    rows = []
    while len(rows) < 40:
        prompt, chosen, rejected = (rng.integers(2, 4, rng.integers(1, 3)).tolist() for _ in range(3))
        if chosen != rejected:
            rows.append((prompt, chosen, rejected))
    swapped, conflicting = contradictions(table(*rows))

    def swaps(a, b):
        return a[0] == b[0] and a[1] == b[2] and a[2] == b[1]

    def conflicts(a, b):
        return a[0] == b[0] and (a[1] == b[2] or a[2] == b[1])

    by_swap = {i for i, a in enumerate(rows) if any(swaps(a, b) for b in rows)}
    by_conflict = {i for i, a in enumerate(rows) if any(conflicts(a, b) for b in rows)} - by_swap
    assert by_swap
    assert {match.at for match in swapped} == by_swap
    assert {match.at for match in conflicting} == by_conflict
    assert all(swaps(rows[match.at], rows[match.other]) for match in swapped)
    assert all(conflicts(rows[match.at], rows[match.other]) for match in conflicting)


def test_same_responses_to_another_prompt_are_no_contradiction():
    assert contradictions(table(([2], [5], [6]), ([3], [6], [5]))) == ([], [])


def test_boundaries_count():
    # The same six tokens, cut elsewhere.
    assert contradictions(table(([2], [5, 6], [7]), ([2, 5], [7], [6]))) == ([], [])


def test_ranking_of_three_responses_conflicts_without_swapping():
    swapped, conflicting = contradictions(table(([2], [5], [6]), ([2], [6], [7])))
    assert swapped == []
    assert conflicting == [Match(0, 1), Match(1, 0)]


def test_repeats_name_the_first():
    assert repeats([b"a", b"b", b"a", b"a"]) == [Match(2, 0), Match(3, 0)]


def test_leak_is_a_prompt_on_both_sides():
    train = table(([2], [5], [6]), ([3], [5], [6]), ([3], [7], [6]))
    assert leaks(train, table(([4], [5], [6]), ([3], [8], [9]))) == [Match(1, 1)]


def test_prompts_are_the_same_before_or_after_a_cut():
    """Pair 0 is read as pair 1 is, whose prompt was that of pair 2 before it was cut; pair 3 is another."""
    cut = table(([2], [5], [6]), ([2], [7], [6]), ([2, 3], [6], [8]), ([4], [5], [6]))
    whole = table(([9, 2], [5], [6]), ([3, 2], [5], [6]), ([3, 2], [5], [6]), ([4], [5], [6]))
    digests = np.frombuffer(b"".join(whole.prompt_digests()), dtype=np.uint8).reshape(4, 16)
    cut = dataclasses.replace(cut, whole_prompts=digests)
    assert first_of_prompt(cut) == [0, 0, 0, 3]
    assert contradictions(cut) == ([], [Match(0, 2), Match(1, 2), Match(2, 0)])
    # Held-out pairs leak if they share the prompt itself with a training pair.
    assert leaks(cut.select([0]), cut.select([1, 2, 3])) == [Match(0, 0)]
    assert leaks(cut.select([1]), cut.select([0, 2, 3])) == [Match(0, 0), Match(1, 0)]


def test_near_leaks_look_past_case_spacing_and_punctuation():
    train = ["How do I do it?", "Straße"]
    assert near_leaks(train, ["how   do i -- do it", "How do I do that?", "STRASSE!", "...", ""]) == [
        Match(0, 0),
        Match(2, 1),
    ]
    assert near_leaks(["?!"], ["!?"]) == []
