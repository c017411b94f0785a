"""Intervals against known ones: the normal interval of large samples, exact draws of small ones, Wilson's by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, permutation_test

from bdpo_pl.statistics import Interval, difference, gap, holm, mean, paired_p, spearman, wilson

RNG = np.random.default_rng(7)


def test_large_sample_has_the_normal_interval():
    values = (RNG.random(3000) < 0.3).astype(float)
    found = mean(values)
    half = 1.96 * math.sqrt(found.value * (1 - found.value) / 3000)
    assert found.value == values.mean()
    assert (found.count, found.clusters) == (3000, 3000)
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.08)
    numbers = RNG.normal(5.0, 2.0, 2000)
    found = mean(numbers, rate=False)
    half = 1.96 * numbers.std() / math.sqrt(2000)
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.08)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draws = RNG.random((300, 120)) < 0.4
    covered = sum(found.low <= 0.4 <= found.high for found in map(mean, draws.astype(float)))
    # 95 % of 300 is 285; three standard errors are 11.
    assert 274 <= covered <= 298


@pytest.mark.parametrize("rate", [0.03, 0.12, 0.5, 0.93])
def test_a_rate_of_few_prompts_is_covered_as_often_as_promised(rate):
    """Exactly: by the chance of each number of failures among 30, of which the bootstrap covered 88 % at 0.12."""
    found = [mean([1.0] * failures + [0.0] * (30 - failures)) for failures in range(31)]
    covered = [interval.low <= rate <= interval.high for interval in found]
    assert binom.pmf(np.arange(31), 30, rate) @ covered > 0.93


def test_more_failures_never_lower_an_end():
    """Whichever prompts fail: otherwise a limit on an end would stop the better of two models."""
    sizes = [1, 1, 2, 3, 6]
    names = np.repeat(np.arange(len(sizes)), sizes)
    for clusters in (None, names):
        ends: dict[int, set[tuple[float, float]]] = {}
        for _ in range(400):
            values = (RNG.random(len(names)) < RNG.random()).astype(float)
            found = mean(values, clusters)
            ends.setdefault(int(values.sum()), set()).add((found.low, found.high))
        assert len(ends) == len(names) + 1
        assert all(len(same) == 1 for same in ends.values())
        in_order = [ends[failures].pop() for failures in sorted(ends)]
        assert in_order == sorted(in_order)
        assert sorted(high for _, high in in_order) == [high for _, high in in_order]


def test_ends_are_quantiles_of_all_draws_with_replacement():
    """Of clusters of unlike sizes, where all 4⁴ draws can be written out."""
    clusters = {"a": [1.0], "b": [0.0, 0.0, 1.0], "c": [1.0, 0.0], "d": [0.0] * 4}
    values = [value for group in clusters.values() for value in group]
    names = [name for name, group in clusters.items() for _ in group]
    means = sorted(
        np.mean(list(itertools.chain(*map(clusters.get, draw)))) for draw in itertools.product("abcd", repeat=4)
    )
    found = mean(values, names, rate=False)
    assert (found.value, found.count, found.clusters) == (0.3, 10, 4)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        at_or_below = np.searchsorted(means, end + 1e-9, side="right") / len(means)
        below = np.searchsorted(means, end - 1e-9) / len(means)
        assert below - 0.02 <= share <= at_or_below + 0.02


def test_copies_in_one_cluster_add_no_certainty():
    values = (RNG.random(60) < 0.3).astype(float)
    alone = mean(values)
    for copies in (2, 5):
        together = mean(np.repeat(values, copies), np.repeat(np.arange(60), copies))
        assert (together.value, together.low, together.high) == pytest.approx((alone.value, alone.low, alone.high))
        assert (together.count, together.clusters) == (60 * copies, 60)
    independent = mean(np.repeat(values, 5))
    assert independent.high - independent.low < 0.6 * (alone.high - alone.low)


def test_order_of_prompts_and_names_of_clusters_mean_nothing():
    values, names = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], ["x", "y", "x", "z", "y", "z"]
    other = mean([1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [1, 1, 2, 2, 3, 3])
    assert mean(values, names).value == other.value
    assert mean(values, names) == mean(values, [name.upper() for name in names])


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n) with z² = 3.8416, calculated by hand.
        (0, 10, 0.0, 0.27755),
        (10, 10, 0.72245, 1.0),
        (0, 1, 0.0, 0.79345),
        (5, 10, 0.23659, 0.76341),
        (8, 80, 0.05156, 0.18509),
    ],
)
def test_wilson_by_hand(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=2e-4)


def test_wilson_of_whole_counts_is_scipys():
    for successes, count in ((0, 7), (3, 7), (7, 7), (61, 80), (1, 4000)):
        expected = binomtest(successes, count).proportion_ci(method="wilson")
        assert wilson(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-8)


def test_spearman_by_hand():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / √(4.5 · 5).
    assert spearman(np.array([0, 7, 7, 90]), np.array([1, 2, 5, 6])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(np.array([1, 2, 3]), np.array([9, 4, 1])) == pytest.approx(-1.0)
    assert spearman(np.array([1, 2, 3]), np.array([5, 5, 5])) is None
    assert spearman(np.array([1, 2]), np.array([1, 2])) is None


def test_rates_that_are_all_alike_have_wilsons_interval_over_clusters():
    for value, expected in ((0.0, (0.0, 0.27755)), (1.0, (0.72245, 1.0))):
        found = mean([value] * 10)
        assert (found.value, found.low, found.high) == pytest.approx((value, *expected), abs=1e-4)
        # Thirty framings of ten requests are ten requests.
        framed = mean([value] * 30, list(range(10)) * 3)
        assert (framed.low, framed.high) == pytest.approx(expected, abs=1e-4)


def test_clusters_of_unlike_sizes_count_by_the_square_of_their_sizes():
    # Kish: (1 + 3 + 2 + 4)² / (1² + 3² + 2² + 4²) = 10/3 of 10 prompts.
    found = mean([1, 0, 0, 1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 2, 2, 3, 3, 3, 3])
    assert (found.low, found.high) == pytest.approx(wilson(0.3 * 10 / 3, 10 / 3))


def test_one_request_alone_is_nothing_to_be_certain_of():
    found = mean([1.0, 0.0, 1.0, 0.0], ["one"] * 4)
    assert (found.value, found.clusters) == (0.5, 1)
    assert found.low < 0.1
    assert found.high > 0.9


def test_numbers_that_are_all_alike_are_given_no_rates_interval():
    for value in (0.0, 1.0, -3.5):
        found = mean([value] * 5, rate=False)
        assert (found.value, found.low, found.high) == (value, value, value)


def test_paired_difference_has_the_interval_of_its_pairs_and_not_of_two_rates():
    first = (RNG.random(2000) < 0.5).astype(float)
    second = np.where(np.arange(2000) % 20 == 0, 0.0, first)
    found = difference(first, second)
    pairs = second - first
    half = 1.96 * pairs.std() / math.sqrt(2000)
    assert found.value == pytest.approx(pairs.mean())
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.1)
    unpaired = 1.96 * math.sqrt((first.var() + second.var()) / 2000)
    assert half < unpaired / 3


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Of six, p is 2/2⁶ = 0.031; of five it is 0.0625, so that no change is within the interval.
        ([0] * 6, [1] * 6, (1.0, 0.6097, 1.0)),
        ([1] * 6, [0] * 6, (-1.0, -1.0, -0.6097)),
        ([0] * 5, [1] * 5, (1.0, 0.0, 1.0)),
        ([1] * 5, [0] * 5, (-1.0, -1.0, 0.0)),
        # Nothing changed: it could yet, for better or for worse.
        ([1, 0, 1, 0, 1], [1, 0, 1, 0, 1], (0.0, -0.4345, 0.4345)),
    ],
)
def test_differences_that_are_all_alike(first, second, expected):
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=1e-4)


def test_differences_by_cluster():
    found = difference([0] * 6, [1, 0] * 3, [1, 1, 2, 2, 3, 3])
    assert (found.value, found.count, found.clusters) == (0.5, 6, 3)
    assert -0.5 < found.low < 0.5 < found.high <= 1.0


def test_no_values_and_wrong_numbers():
    with pytest.raises(ValueError, match="no values"):
        mean([])
    with pytest.raises(ValueError, match="2 values, but 3 clusters"):
        mean([1.0, 0.0], [1, 2, 3])
    with pytest.raises(ValueError, match="need pairs, got 1 and 2"):
        difference([1.0], [1.0, 0.0])


@pytest.mark.parametrize("count", [80, 250, 313])
@pytest.mark.parametrize(("flipped", "p"), [(4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_few_prompts_that_changed_in_one_direction(count, flipped, p):
    before, after = [0.0] * count, [1.0] * flipped + [0.0] * (count - flipped)
    assert paired_p(before, after) == p
    worse, better = difference(before, after), difference(after, before)
    assert (worse.low > 0, better.high < 0) == (p < 0.05, p < 0.05)
    assert worse.value == -better.value == flipped / count


def test_an_interval_and_its_p_value_do_not_contradict_each_other():
    told = 0
    for _ in range(25):
        first, second = (RNG.random((2, 60)) < RNG.random((2, 1))).astype(float)
        clusters = RNG.integers(0, 40, 60).tolist()
        found, p = difference(first, second, clusters), paired_p(first, second, clusters)
        told += p < 0.05
        assert p < 0.05 or found.low <= 0 <= found.high
    assert 3 < told < 22


def test_p_value_of_paired_outcomes_is_the_share_of_exchanges_that_reach_as_far():
    # Five of five that changed, in one direction: 2 of 2⁵ assignments of sides reach as far.
    first, second = [1.0] * 5 + [0.0] * 7, [0.0] * 12
    assert paired_p(first, second) == paired_p(second, first) == 2 / 32
    assert paired_p(first, first) == 1.0
    # All of them one request in five framings: nothing can be told.
    assert paired_p(first, second, ["a"] * 5 + list(range(7))) == 1.0
    with pytest.raises(ValueError, match="pairs"):
        paired_p([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="0 or 1"):
        paired_p([0.5], [1.0])


def test_p_values_are_scipys():
    # Each request alone: the sign test. In clusters: all exchanges of ten, written out by scipy.
    assert paired_p([0.0] * 400, [1.0] * 217 + [0.0] * 183) == pytest.approx(binomtest(0, 217).pvalue, abs=1e-15)
    first, second = np.zeros(100), np.zeros(100)
    second[:34], first[34:51] = 1.0, 1.0
    assert paired_p(first, second) == pytest.approx(binomtest(17, 51).pvalue, rel=1e-9)
    first, second = np.zeros((10, 4)), np.zeros((10, 4))
    for cluster, change in enumerate((4, 3, 3, 2, 2, 1, 1, 1, -1, -3)):
        (second if change > 0 else first)[cluster, : abs(change)] = 1.0
    expected = permutation_test(
        ((second - first).sum(1),), np.sum, permutation_type="samples", vectorized=True, n_resamples=2**10
    )
    assert len(expected.null_distribution) == 2**10
    found = paired_p(first.ravel(), second.ravel(), np.repeat(np.arange(10), 4).tolist())
    assert found == pytest.approx(expected.pvalue, rel=1e-9)


def test_gap_of_two_rates_by_newcombes_examples():
    """Newcombe (1998, Statistics in Medicine 17:873), table II, method 10."""

    def rate(right, count):
        return mean([1.0] * right + [0.0] * (count - right))

    for first, second, expected in (
        ((56, 70), (48, 80), (0.2, 0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.6, 0.1705, 0.8090)),
        ((5, 56), (0, 29), (0.0893, -0.0381, 0.1926)),
        ((0, 10), (0, 20), (0.0, -0.1611, 0.2775)),
        ((10, 10), (0, 10), (1.0, 0.6075, 1.0)),
    ):
        found = gap(rate(*first), rate(*second))
        assert (found.value, found.low, found.high) == pytest.approx(expected, abs=5e-5)
        assert found.count == found.clusters == first[1] + second[1]
    certain = Interval(0.5, 0.5, 0.5, 9, 9)
    assert gap(certain, certain) == Interval(0.0, 0.0, 0.0, 18, 18)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
