"""Truncation: what is kept, that no response becomes empty, and that EOS is lost exactly with the response's end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

BOS, EOS = 1, 2
PAIR = PreferencePair([BOS, *range(10, 20)], [30, 31, EOS], [40, 41, 42, EOS])


def test_a_pair_that_fits_is_untouched():
    for mode in ("drop", "keep_start", "keep_end"):
        assert Truncation(15, mode).apply(PAIR, BOS) is PAIR


def test_drop():
    assert Truncation(14, "drop").apply(PAIR, BOS) is None


def test_keep_start_and_keep_end_shorten_the_prompt_first():
    assert Truncation(10, "keep_start").apply(PAIR, BOS).prompt_ids == [BOS, 10, 11, 12, 13, 14]
    kept = Truncation(10, "keep_end").apply(PAIR, BOS)
    assert kept.prompt_ids == [BOS, 15, 16, 17, 18, 19]
    assert (kept.chosen_ids, kept.rejected_ids) == (PAIR.chosen_ids, PAIR.rejected_ids)
    assert Truncation(10, "keep_end").apply(PAIR, None).prompt_ids == [14, 15, 16, 17, 18, 19]


def test_a_first_token_that_occurs_again_opens_turns_and_is_not_kept_before_an_end():
    turns = PreferencePair([BOS, *range(10, 20), BOS, 20], [30, EOS], [40, EOS])
    assert Truncation(8, "keep_end").apply(turns, BOS).prompt_ids == [16, 17, 18, 19, BOS, 20]


def test_long_responses_lose_their_end_and_eos():
    long = PreferencePair([BOS, 10], [*range(30, 60), EOS], [40, EOS])
    cut = Truncation(8, "keep_end").apply(long, BOS)
    assert cut.chosen_ids == [30, 31, 32, 33, 34, 35]
    assert cut.rejected_ids == [40, EOS]


def test_responses_that_become_equal_are_dropped():
    same_start = PreferencePair([BOS], [5, 5, 5, 6, EOS], [5, 5, 5, 7, EOS])
    assert Truncation(4, "keep_end").apply(same_start, BOS) is None


@given(
    prompt=st.integers(1, 30),
    chosen=st.integers(1, 30),
    rejected=st.integers(1, 30),
    window=st.integers(2, 40),
    mode=st.sampled_from(["keep_start", "keep_end"]),
    allowance=st.none() | st.integers(1, 39),
)
def test_any_pair_fits_afterwards_and_keeps_a_token_of_each_part(prompt, chosen, rejected, window, mode, allowance):
    if allowance is not None and allowance >= window:
        allowance = None
    pair = PreferencePair([BOS] * prompt, [8] * chosen, [9] * rejected)
    cut = Truncation(window, mode, allowance).apply(pair, BOS)
    assert Truncation(window).fits(cut)
    assert min(len(cut.prompt_ids), len(cut.chosen_ids), len(cut.rejected_ids)) >= 1
    if prompt + max(chosen, rejected) > window and cut.chosen_ids == pair.chosen_ids:
        # Nothing more was cut than had to be.
        assert len(cut.prompt_ids) + max(len(cut.chosen_ids), len(cut.rejected_ids)) == window


@pytest.mark.parametrize("arguments", [(1,), (8, "drop", 8), (8, "drop", 0)])
def test_bad_lengths_are_refused(arguments):
    with pytest.raises(InputError, match="max_"):
        Truncation(*arguments)
