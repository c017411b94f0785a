"""The numbers of a diagnosis against plain loops, and what is found in them."""

import dataclasses
import json
import re
import statistics
from itertools import pairwise

import numpy as np
import pytest
import torch

from bdpo_pl.data.report import DataReport
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.diagnosis.findings import find
from bdpo_pl.diagnosis.measures import (
    Measured,
    by_category,
    by_length,
    extremes,
    group,
    length_bias,
    suggested_tau,
    temperatures,
)
from bdpo_pl.diagnosis.page import build_page
from bdpo_pl.diagnosis.results import Diagnosis, Leaks, Places, diagnose_split
from bdpo_pl.losses.balanced_dpo import imbalance_spread

RNG = np.random.default_rng(0)


def measured(num=60, categories=("a", "b", ""), strong_ratio=1.5, shift=0.0, **fields):
    pairs = [
        PreferencePair([i + 2], *(RNG.integers(2, 900, RNG.integers(1, 30)).tolist() for _ in range(2)))
        for i in range(num)
    ]
    table = PairTable.from_pairs(pairs, [1], categories=[categories[i % len(categories)] for i in range(num)])
    comprehension = RNG.normal(size=(2, num)) + np.array([[shift], [0.0]])
    share = 1 / (1 + np.exp(comprehension[0] - comprehension[1]))
    values = {"table": table, "comprehension": comprehension, "weights": np.stack([share, 1 - share])}
    return Measured(**{**values, "scale": np.full(num, 2.0), "strong_ratio": strong_ratio, **fields})


def diagnosis(m, **fields):
    values = {"facts": {}, "unit": "nats per token", "strong_ratio": 1.5, "strong_imbalance": 0.4, "weights_of": None}
    values |= {"splits": {"train": diagnose_split("train", m, [], 3)}, "leaks": Leaks([], [], 0, 9), "loading": []}
    return Diagnosis(**{**values, **fields})


def titles(found, level):
    return " ".join(finding.title for finding in found if finding.level == level)


def test_group_is_the_mean_over_its_pairs():
    m = measured()
    index = np.array([3, 5, 8, 13, 21, 34, 40, 41, 42, 43, 44])
    g = group(m, "some", index)
    imbalance = [m.comprehension[0][i] - m.comprehension[1][i] for i in index]
    assert g.imbalance.value == pytest.approx(statistics.fmean(imbalance))
    half = 1.959964 * statistics.stdev(imbalance) / len(index) ** 0.5
    assert g.imbalance.high - g.imbalance.value == pytest.approx(half)
    assert g.size == pytest.approx(statistics.fmean(map(abs, imbalance)))
    # For softmax weights the ratio is the exponential of the imbalance.
    assert g.strong == pytest.approx(sum(abs(d) >= np.log(1.5) for d in imbalance) / len(index))
    assert g.strength_chosen == pytest.approx(statistics.fmean(2 / (1 + np.exp(d)) for d in imbalance))
    assert g.strength_chosen + g.strength_rejected == pytest.approx(2.0)


def test_mean_of_few_has_no_interval():
    m = measured()
    few, enough = (group(m, "some", np.arange(count)).imbalance for count in (9, 10))
    assert few.value == pytest.approx(float(np.mean(m.imbalance[:9])))
    assert (few.bounded, few.count) == (False, 9)
    assert enough.bounded
    numbers = json.loads(json.dumps(diagnosis(measured(9)).to_json(), allow_nan=False))
    assert numbers["splits"]["train"]["overall"]["chosen"]["low"] is None


@pytest.mark.parametrize("split", [by_category, by_length])
def test_groups_share_out_all_pairs(split):
    m = measured()
    groups = split(m)
    assert sum(g.pairs for g in groups) == 60
    total = sum(g.pairs * g.imbalance.value for g in groups) / 60
    assert total == pytest.approx(group(m, "all").imbalance.value)


def test_categories_come_most_imbalanced_first_and_pairs_without_one_are_named():
    groups = by_category(measured())
    assert {g.name for g in groups} == {"a", "b", "(none)"}
    assert [g.size for g in groups] == sorted((g.size for g in groups), reverse=True)
    assert by_category(measured(categories=("",))) == []


def test_length_groups_do_not_overlap():
    m = measured()
    groups = by_length(m)
    bounds = [tuple(map(float, g.name.split(" to "))) for g in groups]
    assert len(groups) > 3
    assert all(a[-1] < b[0] for a, b in pairwise(bounds))


def test_length_bias_counts_the_longer_side():
    m = measured(3)
    table = PairTable.from_pairs([PreferencePair([2], [3] * w, [4] * r) for w, r in ((5, 1), (4, 4), (9, 2))], [1])
    bias = length_bias(dataclasses.replace(m, table=table))
    assert (bias.chosen_longer, bias.rejected_longer) == (pytest.approx(2 / 3), 0.0)
    assert (bias.mean_chosen, bias.mean_rejected) == (6.0, pytest.approx(7 / 3))


def test_extremes_are_the_ends_and_have_their_sign():
    m = measured()
    high, low = extremes(m, 5)
    ordered = sorted(m.imbalance)
    assert m.imbalance[high].tolist() == ordered[:-6:-1]
    assert m.imbalance[low].tolist() == ordered[:5]
    only_positive = measured(shift=50.0)
    assert [len(side) for side in extremes(only_positive, 100)] == [60, 0]


def test_weight_of_zero_is_no_division_by_zero():
    m = measured(2, weights=np.array([[0.0, 0.5], [1.0, 0.5]]))
    assert m.strong.tolist() == [True, False]
    assert np.isfinite(m.ratio).all()


def test_faults_are_problems_and_come_first():
    split = diagnose_split("train", measured(), [], 0)
    split = dataclasses.replace(split, swapped=[Places("line 1", "line 2")] * 2)
    found = find(diagnosis(measured(), splits={"train": split}, leaks=Leaks([Places("h", "t")], [], 4, 9)))
    assert "2 pairs contradict another" in titles(found, "problem")
    assert "1 pair held out from training share" in titles(found, "problem")
    assert "4 pairs of 9 held out" in titles(found, "notice")
    assert [f.level for f in found] == sorted((f.level for f in found), key=["problem", "notice", "fine"].index)


def test_sound_set_gives_no_problem():
    sound = measured()
    sound = dataclasses.replace(sound, comprehension=np.zeros((2, 60)), weights=np.full((2, 60), 0.5))
    found = find(diagnosis(sound))
    assert not titles(found, "problem")
    assert "0.0% of the 60 training pairs" in titles(found, "fine")
    assert "Neither side" in titles(found, "fine")
    slight = find(diagnosis(dataclasses.replace(sound, comprehension=np.array([[0.001] * 60, [0.0] * 60]))))
    assert "The chosen responses are the better comprehended ones" in titles(slight, "fine")


def test_notices_of_strength_direction_and_missing_weights():
    found = find(diagnosis(measured(shift=3.0), weights_of="Balanced DPO"))
    assert "training pairs would be re-weighted strongly" in titles(found, "notice")
    assert "The chosen responses are the better comprehended ones, by" in titles(found, "notice")
    assert any("applies no weights: these are what Balanced DPO would do" in f.detail for f in found)


@pytest.mark.parametrize(("num", "named"), [(9, False), (10, True)])
def test_uneven_categories_have_enough_pairs(num, named):
    d = np.array([9.0] * num + [0.1] * (60 - num))
    m = measured(comprehension=np.stack([d, np.zeros(60)]))
    m = dataclasses.replace(m, table=dataclasses.replace(m.table, categories=["far"] * num + ["near"] * (60 - num)))
    assert ("whole: far (" in titles(find(diagnosis(m)), "notice")) == named


def test_held_out_pairs_of_another_kind_are_noticed():
    near = measured(num=60)
    far = dataclasses.replace(near, comprehension=3 * near.comprehension)
    splits = {name: diagnose_split(name, m, [], 0) for name, m in (("train", near), ("held_out", far))}
    assert "Held-out pairs are 3.0 times as imbalanced" in titles(find(diagnosis(near, splits=splits)), "notice")


def test_duplicates_dropped_on_loading_are_told_from_those_kept():
    m = measured()
    reports = [
        DataReport("train", "x.jsonl", dropped={"duplicate of an earlier pair": ["x.jsonl, line 9"]}),
        DataReport("train", "y.jsonl", dropped={"duplicate of a pair in an earlier source": ["y.jsonl, line 1"]}),
        DataReport("train", "z.jsonl"),
    ]
    dropped = diagnose_split("train", m, reports, 0)
    assert (dropped.duplicates, dropped.duplicates_dropped) == (["x.jsonl, line 9", "y.jsonl, line 1"], True)
    twice = m.table.select(np.array([0, 1, 0]))
    kept = diagnose_split("train", measured(3, table=twice), reports[2:], 0)
    assert (kept.duplicates, kept.duplicates_dropped) == (["pair 0"], False)


@pytest.mark.parametrize("num", [1, 2])
def test_page_of_hardly_any_pairs_holds_no_nan(num):
    m = measured(num, categories=("",))
    html = build_page(diagnosis(m, leaks=None), {"train": m}).render()
    assert "nan" not in html.lower()
    assert f"only {num} pair" in html
    assert "carry no category" in html


def test_tau_is_held_against_the_spread_of_the_imbalance():
    d = np.linspace(-2.0, 2.0, 101)
    m = measured(101, comprehension=np.stack([d, np.zeros(101)]))
    assert group(m, "all").spread == pytest.approx(
        statistics.median(abs(d)) / statistics.NormalDist().inv_cdf(0.75), rel=1e-4
    )
    # What the loss would take.
    assert group(m, "all").spread == imbalance_spread(*map(torch.from_numpy, m.comprehension))
    assert suggested_tau(m) == 1.5
    rows = {row.tau: row for row in temperatures(m, 0.3)}
    assert {0.3, 1.5} < rows.keys()
    # Softmax weights differ by exp(|d| / τ).
    assert rows[0.3].largest == pytest.approx(np.exp(2.0 / 0.3))
    assert rows[1.5].median == pytest.approx(np.exp(1.0 / 1.5))

    def said(tau):
        of = {"tau": tau, "suggested_tau": 1.5, "temperatures": temperatures(m, tau)}
        return find(diagnosis(m, **of))

    # Weights of 28 to 1 and of 148 to 1 in the median.
    assert "τ is 0.3, and the spread" in titles(said(0.3), "notice")
    assert "τ is 0.2, and the spread" in titles(said(0.2), "problem")
    assert any("--tau 1.5" in finding.detail for finding in said(0.3))
    assert "τ is 5, and the spread" in titles(said(5.0), "notice")
    assert "τ = 1 is about the spread" in titles(said(1.0), "fine")
    html = build_page(
        diagnosis(m, tau=0.3, suggested_tau=1.5, temperatures=temperatures(m, 0.3)), {"train": m}
    ).render()
    assert "0.3 (in use)" in html
    assert "1.5 (auto)" in html


def test_where_all_pairs_lean_the_same_way_a_tau_above_the_spread_is_suggested():
    d = np.linspace(-1.6, -1.4, 100)
    m = measured(100, comprehension=np.stack([d, np.zeros(100)]))
    spread = group(m, "all").spread

    def said(tau):
        return find(diagnosis(m, tau=tau, suggested_tau=suggested_tau(m), temperatures=temperatures(m, tau)))

    (found,) = (finding for finding in said(spread) if finding.title.startswith("τ is"))
    assert found.level == "problem"
    assert "nearly DPO" not in found.detail
    assert "max_weight_ratio" in found.detail
    advised = float(re.search(r"--tau ([\d.]+), at which 95 % stay within 50", found.detail)[1])
    # Softmax weights differ by exp(|d| / τ).
    assert 40 < np.exp(np.quantile(abs(d), 0.95) / advised) <= 50
    assert f"At τ = {advised:g} 95 % of the pairs" in titles(said(advised), "fine")
    (large,) = (finding for finding in said(5.0) if finding.title.startswith("τ is"))
    assert (large.level, "nearly DPO" in large.detail) == ("notice", True)


def test_a_bound_of_the_loss_holds_for_the_weights_of_each_tau():
    d = np.linspace(-2.0, 2.0, 101)
    m = measured(101, comprehension=np.stack([d, np.zeros(101)]))

    def found(tau, most, m=m):
        rows = temperatures(m, tau, most)
        assert max(row.largest for row in rows) <= most
        said = find(diagnosis(m, tau=tau, suggested_tau=suggested_tau(m), temperatures=rows, max_weight_ratio=most))
        return next(finding for finding in said if "τ" in finding.title)

    small = found(0.1, 3.0)
    assert small.level == "notice"
    assert "at least 3.00 times the other's weight in half of the pairs" in small.detail
    assert "--tau 1.5" in small.detail
    assert "max_weight_ratio" not in small.detail
    # 95 % of 1.6 within 50 times, found from a τ whose weights are below the bound.
    d = np.linspace(-1.6, -1.4, 100)
    leaning = measured(100, comprehension=np.stack([d, np.zeros(100)]))
    large = found(0.1, 100.0, leaning)
    assert "--tau 0.41, at which 95 % stay within 50" in large.detail
    assert "or a lower model.loss.max_weight_ratio" in large.detail
    assert found(0.41, 100.0, leaning).level == "fine"
    far = dataclasses.replace(leaning, comprehension=99 * leaning.comprehension)
    assert "Milder: a lower model.loss.max_weight_ratio." in found(0.1, 60.0, far).detail


def test_a_tau_far_below_the_spread_gives_numbers_that_json_has():
    m = measured(20, comprehension=np.stack([np.full(20, 900.0), np.zeros(20)]))
    assert all(np.isfinite(row.largest) for row in temperatures(m, 0.01))
    # All pairs are imbalanced alike: a tenth of the imbalance.
    assert suggested_tau(m) == 90.0
    balanced = measured(20, comprehension=np.ones((2, 20)))
    assert suggested_tau(balanced) is None
