"""The study's report: statistics against values by hand, verdicts, and the page from whole and partial records."""

import json
import math
import re
import statistics as stdlib
from dataclasses import asdict, replace

import pytest
import study_records as records

from bdpo_pl.errors import InputError
from benchmarks.study.report import facts
from benchmarks.study.report.__main__ import PAGE, ROOT, page, reading_of, write
from benchmarks.study.report.choices import chosen_table, error, trials_table
from benchmarks.study.report.claims import ABSENT, CHECKS, FAILS, HOLDS, UNKNOWN, verdict, verdicts
from benchmarks.study.report.results import ABILITY, FRAMED_ATTACKS, GAP, OUTCOMES, REFUSAL, Results, load
from benchmarks.study.report.statistics import Interval, holm, interval, paired, quantile
from benchmarks.study.report.tables import (
    Contrast,
    Group,
    difference_text,
    differences,
    mean_text,
    means,
    number,
    table,
)
from benchmarks.study.run import plan

# Student's t, two-sided 95 %, from printed tables.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 9: 2.262, 30: 2.042, 120: 1.980}
DPO, BDPO = (Group(name, "final", name) for name in ("DPO", "B-DPO"))


@pytest.fixture(scope="module")
def quick():
    """The quick plan with one seed where there are few; one cell has failed."""
    size = replace(plan.QUICK, seeds=3, few_seeds=1)
    return records.study(size, lambda s: (s.section, s.method, s.seed) == ("final", "DPO+BW", 1))


@pytest.fixture(scope="module")
def whole():
    return records.study(plan.FULL)


def results(cells):
    return Results("records.jsonl", [records.HEAD], cells)


def rows_of(text):
    """Cells of a Markdown table's rows by the first one."""
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


def test_student_against_printed_tables():
    assert {freedom: round(quantile(freedom), 3) for freedom in T} == T


def test_interval_by_hand():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # Standard error √(2.5 / 5), t = 3 / 0.7071 with 4 degrees of freedom.
    assert (found.mean, found.count) == (3.0, 5)
    assert found.half == pytest.approx(2.776445 * math.sqrt(0.5))
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)
    assert found.p == pytest.approx(0.013236, rel=1e-4)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0], bound=3.0).p == pytest.approx(1.0)


def test_interval_of_too_little():
    assert interval([]).count == 0
    one = interval([2.0])
    assert one.mean == 2.0
    assert math.isnan(one.half)
    assert math.isnan(one.p)
    # Equal values have no error to estimate, so no interval; four signs that agree come about once in eight times.
    equal = interval([0.1 + 0.2, 0.3, 0.3, 0.3])
    assert (equal.mean, equal.count, equal.p) == (pytest.approx(0.3), 4, 0.125)
    assert math.isnan(equal.half)
    assert interval([0.0, 0.0]).p == 1.0


def test_differences_are_paired_by_seed():
    found = paired({0: 5.0, 1: 7.0, 2: 6.0, 9: 100.0}, {2: 3.0, 1: 5.0, 0: 4.0, 8: -100.0})
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 * 1.0 / math.sqrt(3))
    # One of 199 pairs fewer in each seed, as means in float32: equal but for rounding.
    shares = ({0: 0.5226130485534668, 1: 0.5175879597663879}, {0: 0.5276381969451904, 1: 0.5226130485534668})
    assert math.isnan(paired(*shares).half)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_nan = holm([0.01, math.nan, 0.02])
    assert [with_nan[0], with_nan[2]] == pytest.approx([0.02, 0.02])
    assert math.isnan(with_nan[1])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "p", "sign", "bound", "said"),
    [
        (1.0, 3.0, 0.01, 1, 0.0, HOLDS),
        (1.0, 3.0, 0.01, -1, 0.0, FAILS),
        (-3.0, -1.0, 0.01, -1, 0.0, HOLDS),
        (-1.0, 3.0, 0.4, 1, 0.0, UNKNOWN),
        # The interval excludes 0, and the correction takes it back.
        (1.0, 3.0, 0.2, 1, 0.0, UNKNOWN),
        (-1.0, 1.0, 0.01, 1, -2.0, HOLDS),
        (-3.0, 1.0, 0.3, 1, -2.0, UNKNOWN),
    ],
)
def test_verdict_follows_the_interval(low, high, p, sign, bound, said):
    found = Interval((low + high) / 2, (high - low) / 2, 10, p)
    assert verdict(found, p, sign, bound) == said
    assert verdict(Interval(math.nan, math.nan, 0, math.nan), math.nan, sign, bound) == ABSENT
    assert verdict(Interval(2.0, math.nan, 1, math.nan), math.nan, sign, bound) == UNKNOWN


def test_numbers_are_written_with_their_intervals():
    assert mean_text(Interval(41.26, 2.04, 5, 0.1), 1) == "41.3 ± 2.0"
    assert mean_text(Interval(41.26, math.nan, 1, math.nan), 1) == "41.3 (1 seed)"
    assert mean_text(interval([100.0, 100.0]), 1) == "100.0 ± –"
    assert mean_text(interval([]), 1) == "–"
    found = Interval(-3.2, 1.8, 5, 0.01)
    assert difference_text(found, 1) == "−3.2 [−5.0, −1.4]"
    assert difference_text(found, 1, 0.01) == "**−3.2 [−5.0, −1.4]**"
    assert difference_text(found, 1, 0.05) == "−3.2 [−5.0, −1.4]"
    assert difference_text(interval([-0.5] * 3), 1) == "−0.5 [–]"
    assert (number(-0.04, 1), number(-0.04, 1, sign=True), number(0.06, 1, sign=True)) == ("0.0", "0.0", "+0.1")
    assert table(["", "a"], [["|x|", "1"]]).splitlines()[-1] == "| \\|x\\| | 1 |"


def test_a_tables_means_and_differences_are_those_of_the_records(whole):
    rates = {
        name: [
            100 * cell["metrics"]["attack_success"]["framed"]
            for seed in range(10)
            for cell in whole
            if (cell["setting"]["section"], cell["setting"]["method"], cell["setting"]["seed"]) == ("final", name, seed)
        ]
        for name in ("DPO", "B-DPO")
    }
    shown = rows_of(means(results(whole), [DPO, BDPO], OUTCOMES))
    for name, values in rates.items():
        half = T[9] * stdlib.stdev(values) / math.sqrt(10)
        assert shown[name][2] == f"{stdlib.mean(values):.1f} ± {half:.1f}"
    apart = [b - a for a, b in zip(*rates.values(), strict=True)]
    half = T[9] * stdlib.stdev(apart) / math.sqrt(10)
    mean = stdlib.mean(apart)
    found = differences(results(whole), [Contrast("B-DPO", BDPO, DPO)])
    numbers = [float(text) for text in re.findall(r"[-\d.]+", rows_of(found.text)["B-DPO"][2].replace("−", "-"))]
    assert numbers == pytest.approx([mean, mean - half, mean + half], abs=0.06)
    assert found.tests == len(OUTCOMES)
    assert "B-DPO: " in found.said
    assert "attack success, unseen framings better" in found.said


def test_a_failed_seed_is_left_out_and_said(quick):
    found = results(quick)
    assert set(found.series(REFUSAL, "final", "DPO+BW")) == {0, 2}
    bw = Group("DPO+BW", "final", "DPO+BW")
    assert bw.name(found) == "DPO+BW (1 of 3 seeds failed)"
    text = differences(found, [Contrast("B-DPO", BDPO, DPO), Contrast("DPO+BW", bw, DPO)]).text
    assert "| DPO+BW (2 seeds) |" in text
    assert f"1 of {len(quick)} cells failed** with numbers that were not finite: DPO+BW in final (1)." in page(found)


def test_a_number_that_is_not_finite_is_no_value(quick):
    cells = json.loads(json.dumps(quick))
    places = {(c["setting"]["section"], c["setting"]["method"], c["setting"]["seed"]): c for c in cells}
    cell = places["final", "DPO", 2]
    cell["metrics"]["ability"]["all"] = math.nan
    assert set(results(cells).series(ABILITY, "final", "DPO")) == {0, 1}
    assert set(results(cells).series(REFUSAL, "final", "DPO")) == {0, 1, 2}
    assert not re.search(r"\bnan\b", page(results(cells)), re.I)


def test_the_gap_is_in_one_unit(whole):
    (cell,) = results(whole).pick("final", "SimPO")[:1]
    pairs = cell["metrics"]["pairs"]
    assert GAP.of(cell) == pytest.approx(pairs["train_probe/margin"] - pairs["held_out/margin"])
    reference = results(whole).pick("final", "reference")[0]
    assert math.isnan(GAP.of(reference))


def test_the_confirmation_compares_within_a_reference(whole):
    found = results(whole)
    rows = rows_of("\n".join([facts.confirmation(found)["means"], facts.confirmation(found)["differences"].text]))
    # Fewer seeds than the first reference's are told.
    assert [name.removesuffix(" (10 seeds)") for name in rows if "−" in name] == [
        f"reference {world}: B-DPO − {other}"
        for world in (1, 3, 4)
        for other in ("DPO", "DPO, settings as B-DPO's", "B-DPO, τ 1")
    ]
    for each in facts.confirmation_contrasts(found):
        assert each.first.variant == each.second.variant
        assert each.of(found, FRAMED_ATTACKS).count == (20 if each.first.variant == "reference 1" else 10)
    # The invented B-DPO is safer than DPO, and alike with any τ.
    assert all(("**" in cells[0]) == ("τ" not in name) for name, cells in rows.items() if "−" in name)


def test_claims_are_told_from_the_records(whole):
    told = {(check.claim, check.what): said for check, _, _, said in verdicts(results(whole), CHECKS)}
    safer = [said for (claim, _), said in told.items() if claim == "B-DPO is safer than DPO"]
    # The invented B-DPO is far safer than anything else, and nothing else differs but by chance.
    assert safer == [HOLDS] * 3
    assert {said for (claim, _), said in told.items() if claim.startswith("Balance weights alone")} == {UNKNOWN}
    swap = {"DPO": "B-DPO", "B-DPO": "DPO"}
    swapped = [
        cell | {"setting": cell["setting"] | {"method": swap.get(cell["setting"]["method"], cell["setting"]["method"])}}
        for cell in whole
        if cell["setting"]["section"] == "final"
    ]
    told = {check.claim: said for check, _, _, said in verdicts(results(swapped), CHECKS)}
    assert told["B-DPO is safer than DPO"] == FAILS
    assert told["… with another reference too"] == ABSENT


def test_what_was_chosen_is_checked_against_the_trials(whole):
    found = results(whole)
    rows = rows_of(chosen_table(found))
    trials = plan.FULL.betas * len(plan.FULL.learning_rates) * len(plan.FULL.epochs)
    assert {row[0] for name, row in rows.items() if name in {m.name for m in plan.METHODS}} == {str(trials)}
    best = plan.chosen(plan.FULL, {cell["key"]: cell for cell in whole})
    assert f"β {best['IPO'].arguments['beta']:g}" in rows["IPO"][2]
    assert trials_table(found).count("**") == 2 * len(plan.METHODS)
    # Another setting is tested than the one with the smallest score.
    worse = [
        cell | {"setting": cell["setting"] | {"epochs": 3 - best["IPO"].epochs}}
        if (cell["setting"]["section"], cell["setting"]["method"]) == ("final", "IPO")
        else cell
        for cell in whole
    ]
    with pytest.raises(InputError, match=r"IPO is tested with .* smaller validation score; .*--prune"):
        chosen_table(results(worse))


def test_error_of_a_trial_pools_the_variance_between_seeds(whole):
    def score(cell):
        m = cell["metrics"]
        attacks = (m["attack_success"]["harmful"] + m["attack_success"]["framed"]) / 2
        return 100 * (attacks + m["over_refusal"]["mean"] + 1 - m["ability"]["all"]) / 3

    tuned = [cell for cell in whole if cell["setting"]["section"] == "tuning"]
    by_trial = {}
    for cell in tuned:
        fields = {name: value for name, value in cell["setting"].items() if name != "seed"}
        by_trial.setdefault(json.dumps(fields, sort_keys=True), []).append(score(cell))
    variance = stdlib.mean(stdlib.variance(scores) for scores in by_trial.values())
    half, seeds = error(results(whole))
    assert seeds == len(plan.FULL.tuning_seeds)
    # Of some 400 degrees of freedom t is nearly normal.
    assert half == pytest.approx(1.966 * math.sqrt(variance / seeds), rel=1e-3)


def test_two_cells_of_one_place_are_an_error(quick):
    double = {**quick[0], "key": "another"}
    with pytest.raises(InputError, match=r"and another are both of .*--prune"):
        results([*quick, double])


def test_the_page_of_quick_records_says_what_they_lack(quick):
    text = page(results(quick), "A reading by hand.\n")
    assert "**Less than the whole study.**" in text
    assert "replication 0 of " in text
    assert "Methods without results: IPO; CPO; SimPO" in text
    assert "## What it comes to\n\nA reading by hand.\n\n## " in text
    assert "Not in the records." in text
    assert "(1 seed)" in text
    assert "an invented processor" in text
    assert "\n\n\n" not in text


def test_the_page_of_the_whole_study_lacks_nothing(whole):
    text = page(results(whole))
    assert "Less than the whole" not in text
    assert "Not in the records" not in text
    assert "not in the records" not in text.replace("gradients are not in the records", "")
    for section in ("The methods", "Ablation", "On the way", "The paper's claims, one by one", "Running a cell again"):
        assert f"\n## {section}\n" in text
    for name in plan.VARIANTS:
        assert f"\n| {name} | " in text
    # Every table has as many cells in each row as in its head.
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize("section", ["tuning", "final", "imbalance", "curves", "sensitivity"])
def test_the_page_is_made_of_any_section_alone(quick, section):
    some = [cell for cell in quick if cell["setting"]["section"] == section]
    text = page(Results("records.jsonl", [], some))
    assert "Not in the records." in text
    assert "do not say on which machine" in text


def test_records_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: no such file; run"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text(json.dumps(records.HEAD) + "\n")
    with pytest.raises(InputError, match="no finished cell"):
        load(tmp_path / "empty.jsonl")


def test_figures_are_the_same_bytes_each_time_and_small(quick, tmp_path):
    pytest.importorskip("matplotlib")
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in [records.HEAD, *quick]), encoding="utf-8")
    reading_of(tmp_path / "one.md").write_text("Read by hand.", encoding="utf-8")
    first, second = write(source, tmp_path / "one.md"), write(source, tmp_path / "two" / "one.md")
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) == 6
    for one, two in zip(first[1:], second[1:], strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert one.stat().st_size < 150_000
        assert "fill: #ffffff" in one.read_text(encoding="utf-8")
    text = first[0].read_text(encoding="utf-8")
    assert "Read by hand." in text
    assert set(re.findall(r"\]\((one/\w+\.svg)\)", text)) == {f"one/{path.name}" for path in first[1:]}


def test_the_committed_page_is_what_its_records_make():
    if not PAGE.exists():
        pytest.skip("no page yet: python -m benchmarks.study.report RECORDS")
    text = PAGE.read_text(encoding="utf-8")
    named = re.search(r"benchmarks\.study\.report (\S+)`", text)
    assert named, f"{PAGE} does not say which records it is made of"
    reading = reading_of(PAGE)
    said = reading.read_text(encoding="utf-8") if reading.exists() else ""
    # Records that are not there are an error, and no reason to skip.
    assert text == page(load(ROOT / named[1], named[1]), said, PAGE.stem)
    for figure in re.findall(r"\]\((study/\w+\.svg)\)", text):
        assert (PAGE.parent / figure).is_file()


def test_invented_records_have_the_shape_of_a_cell(quick):
    setting = plan.tuning(plan.QUICK)[0]
    assert asdict(setting).keys() == quick[0]["setting"].keys()
    assert FRAMED_ATTACKS.of(quick[0]) == pytest.approx(100 * quick[0]["metrics"]["attack_success"]["framed"])
