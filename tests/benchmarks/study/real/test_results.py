"""The results' page of the study with a real model: the registered rule on invented records, and its tables."""

import json
import re
import shlex
import shutil

import pytest
from scipy import stats

from bdpo_pl.errors import InputError
from benchmarks.study.real import plan, report, results, rules
from benchmarks.study.report.__main__ import ROOT, reading_of

HEAD = {
    "command": ["python", "-m", "benchmarks.study.real"],
    "date": "2026-01-02T03:04:05Z",
    "machine": {"device": "an invented processor", "versions": {"torch": "2.11.0", "python": "3.12"}},
}
BASE = {"gap/margin": 2.0, "held_out/logp_accuracy": 0.5, "held_out/drift_chosen": 1.0, "held_out/margin": 0.2}
RATES = {"xstest_harmful": 0.5, "strongreject": 0.3, "xstest_benign": 0.1}
ALIKE = {
    "matched": 150.0, "difference/log chosen tokens": 0.01, "difference/log rejected tokens": -0.02,
    "difference/difficulty": 0.03, "size/balanced": 0.1, "size/imbalanced": 0.9,
}  # fmt: skip
# What a seed adds to every method alike, and what it adds to B-DPO alone.
SHARED, OWN = (0.03, -0.02, 0.05, 0.0, -0.04), (0.001, -0.002, 0.001, 0.002, -0.001)


def records(seeds=plan.SEEDS, everywhere=None, sharp=None, wider=1.0, **better):
    """All cells; `better` says by how much B-DPO differs from the others in an outcome, `sharp` B-DPO with τ 0.25.

    All methods differ by `everywhere` from the model before training, and the gaps of the halves by `wider`.
    """
    trials = [{"key": c.key, "cell": as_fields(c), "pairs": dict(BASE), "seconds": 3600.0} for c in plan.tuning()]
    best = plan.chosen({trial["key"]: trial for trial in trials})
    yield {"key": plan.reference().key, "cell": as_fields(plan.reference()), "suites": dict(RATES), "seconds": 0.0}
    yield from trials
    for cell in plan.final(best):
        if cell.seed not in seeds:
            continue
        shared, own = SHARED[cell.seed], OWN[cell.seed] if cell.method == "B-DPO" else 0.0
        own = OWN[cell.seed] / 2 if cell.method == rules.SHARP else own
        moved = {"B-DPO": better, rules.SHARP: sharp or {}}.get(cell.method, {})
        always = everywhere or {}
        added = {name: shared + own + moved.get(name, 0.0) + always.get(name, 0.0) for name in BASE | RATES}
        pairs, suites = ({name: value + added[name] for name, value in of.items()} for of in (BASE, RATES))
        yield {"key": cell.key, "cell": as_fields(cell), "pairs": pairs, "suites": suites, "seconds": 0.0}
    for cell in plan.halves(best) if len(seeds) == 5 else ():
        apart = OWN[cell.seed] + wider if cell.half == "imbalanced" else 0.0
        pairs = BASE | {"gap/margin": BASE["gap/margin"] + SHARED[cell.seed] + apart, "train_probe/margin": 2.0}
        yield {"key": cell.key, "cell": as_fields(cell), "pairs": pairs, "halves": dict(ALIKE), "seconds": 0.0}


def second_records(seeds=plan.SEEDS, gap=0.0):
    """Cells of the confirmation, in which the gap of B-DPO differs by `gap`."""
    trials = {cell.key: {"pairs": BASE} for cell in plan.tuning()}
    for cell in plan.confirmation(plan.chosen(trials)):
        if cell.seed in seeds:
            own = OWN[cell.seed] + gap if cell.method == "B-DPO" else 0.0
            pairs = BASE | {"gap/margin": BASE["gap/margin"] + SHARED[cell.seed] + own, "train_probe/margin": 2.2}
            yield {"key": cell.key, "cell": as_fields(cell), "pairs": pairs, "seconds": 1800.0}


def as_fields(cell):
    return json.loads(json.dumps(vars(cell)))


def load(tmp_path, **options):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (HEAD, *records(**options))))
    return results.load_real(path)


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ({}, "not told"),
        ({"gap/margin": -0.5}, "helps"),
        ({"gap/margin": 0.5}, "harms"),
        ({"xstest_harmful": 0.2}, "helps"),
        ({"strongreject": -0.2}, "harms"),
        # A gain is none where safe prompts are refused more, or fewer test pairs are ranked right.
        ({"gap/margin": -0.5, "xstest_benign": 0.2}, "not told"),
        ({"gap/margin": -0.5, "held_out/logp_accuracy": -0.2}, "not told"),
        ({"gap/margin": -0.5, "xstest_benign": -0.2}, "helps"),
        # Better and worse at once is not one of them.
        ({"gap/margin": -0.5, "xstest_harmful": -0.2}, "both"),
        ({"gap/margin": 0.5, "xstest_harmful": 0.2}, "both"),
        # Test pairs and safe prompts alone decide nothing.
        ({"held_out/logp_accuracy": 0.2}, "not told"),
    ],
)
def test_the_registered_rule(tmp_path, better, verdict):
    assert rules.answer(load(tmp_path, **better)).verdict == verdict


def test_differences_are_paired_by_seed(tmp_path):
    found = rules.answer(load(tmp_path, **{"gap/margin": -0.5})).found[results.GAP.name]
    # What all methods have in common of a seed is in neither mean nor interval.
    t = stats.ttest_1samp([own - 0.5 for own in OWN], 0.0)
    low, high = t.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.4998, low, high))
    assert found.p == pytest.approx(t.pvalue)


def test_no_answer_before_every_seed_is_there(tmp_path):
    loaded = load(tmp_path, seeds=(0, 1, 2), **{"gap/margin": -0.5})
    assert rules.answer(loaded).verdict == "not finished"
    page = report.page(loaded)
    assert "final cells 18 of 30" in page
    assert "3 of 5 seeds are there: no answer yet" in page
    assert "helps** here" not in page


def test_the_page_has_the_answer_the_tables_and_the_floor(tmp_path):
    page = report.page(load(tmp_path, **{"gap/margin": -0.5, "xstest_benign": 0.0}))
    assert "Balanced DPO helps** here" in page
    assert "**Not finished" not in page
    assert "| margin gap, nats ↓ | **−0.50 [−0.50, −0.50]** | 0.000 |" in page
    assert page.count("| **DPO** |") == 1
    assert "25 hours" not in page
    assert "24.0 hours" in page
    assert "an invented processor; torch 2.11.0" in page
    assert "floor" not in page


def test_the_halves_are_compared_seed_by_seed(tmp_path):
    page = report.page(load(tmp_path))
    assert "of the 150 matched pairs on each side the mean |imbalance| is 0.10 and 0.90 nats a token" in page
    # Margins that are the same in every seed have no interval.
    assert "| imbalanced half − balanced half | 0.00 [–] | 0.00 [–] | **+1.00 [1.00, 1.00]** |" in page


def test_a_rate_that_cannot_move_is_named_and_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(RATES, "xstest_benign", 0.02)
    monkeypatch.setitem(RATES, "xstest_harmful", 0.98)
    monkeypatch.setitem(RATES, "strongreject", 0.96)
    loaded = load(tmp_path, xstest_harmful=-0.3)
    assert list(rules.bounds(loaded).values()) == [
        "harmful prompts refused: 97.0 % before training, a ceiling (over 95 %)",
        "safe prompts refused: 2.0 % before training, a floor (under 5 %)",
    ]
    assert rules.answer(loaded).verdict == "not told"
    assert "a ceiling (over 95 %): no result, it decides nothing" in report.page(loaded)


def test_a_rate_that_training_takes_to_a_floor_is_no_result_either(tmp_path):
    lost = {"xstest_harmful": -0.49, "strongreject": -0.29}
    # Under one method alone it is what the method did.
    assert rules.answer(load(tmp_path, **lost)).verdict == "harms"
    loaded = load(tmp_path, everywhere=lost, xstest_harmful=0.02)
    assert list(rules.bounds(loaded).values()) == [
        "harmful prompts refused: 1.4 and 2.4 % after DPO and B-DPO, a floor (under 5 %)"
    ]
    assert rules.answer(loaded).adjusted[results.REFUSED.name] < 0.05
    assert rules.answer(loaded).verdict == "not told"


@pytest.mark.parametrize(
    ("wider", "verdict", "said"),
    [
        (1.0, "holds", "**the observation holds** here"),
        (-1.0, "opposite", "**the gap is smaller on the imbalanced side**"),
        (0.0, "not told", "**the study does not tell** whether the observation holds"),
    ],
)
def test_what_is_said_of_the_halves(tmp_path, wider, verdict, said):
    loaded = load(tmp_path, wider=wider)
    assert rules.observation(loaded)[0] == verdict
    assert said in report.page(loaded)
    assert rules.observation(load(tmp_path, seeds=(0, 1)))[0] == "not finished"


@pytest.mark.parametrize(
    ("sharp", "verdict"),
    [({}, "stays"), ({"gap/margin": -0.5}, "0.25"), ({"gap/margin": 0.5}, "stays"), ({"strongreject": 0.2}, "0.25")],
)
def test_the_default_temperature_stays_unless_the_other_one_is_better(tmp_path, sharp, verdict):
    assert rules.default_temperature(load(tmp_path, sharp=sharp)) == verdict
    assert rules.default_temperature(load(tmp_path, seeds=(0, 1), sharp=sharp)) == "not finished"


def test_page_and_figure_are_written_and_the_same_again(tmp_path):
    pytest.importorskip("matplotlib")
    load(tmp_path)
    written = [report.write(tmp_path / "records.jsonl", tmp_path / f"{i}" / "page.md") for i in range(2)]
    assert [path.name for path in written[0]] == ["page.md", "methods.svg"]
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert "![Every method" in written[0][0].read_text()


def test_the_committed_page_is_what_its_command_makes(tmp_path, monkeypatch):
    text = report.PAGE.read_text(encoding="utf-8")
    named = re.search(r"```\npython -m benchmarks\.study\.real\.report ([^`]+)```", text)
    assert named, f"{report.PAGE} does not say by which command it is made"
    out = tmp_path / report.PAGE.name
    shutil.copy(reading_of(report.PAGE), reading_of(out))
    monkeypatch.chdir(ROOT)
    report.main([*shlex.split(named[1].replace("\\\n", " ")), "--no-figures", "--out", str(out)])
    assert out.read_text(encoding="utf-8") == text
    for figure in re.findall(r"\]\((study_real_results/\w+\.svg)\)", text):
        assert (report.PAGE.parent / figure).is_file()


def test_what_is_no_file_of_records_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no such file; run `python -m benchmarks.study.real` first"):
        results.load_real(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("options", "verdict", "said"),
    [
        ({"gap": -0.3}, "confirmed", "the smaller margin gap is confirmed"),
        ({"gap": 0.3}, "opposite", "the gap of B-DPO is the larger one here"),
        ({}, "not told", "**not confirmed**"),
        ({"gap": -0.3, "seeds": (0, 1)}, "not finished", "2 of 5 seeds have both methods"),
    ],
)
def test_a_second_model_confirms_or_not(tmp_path, options, verdict, said):
    path = tmp_path / "second.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (HEAD, *second_records(**options))))
    second = results.load_real(path, "second.jsonl")
    found, gap = rules.confirmation(second)
    assert found == verdict
    assert gap.mean == pytest.approx(
        options.get("gap", 0.0)
        + sum(OWN[s] for s in options.get("seeds", plan.SEEDS)) / len(options.get("seeds", plan.SEEDS))
    )
    text = report.page(load(tmp_path), second=second)
    assert said in text
    assert "Records: `second.jsonl`" in text
    rows = [line for line in text.splitlines() if line.startswith("| B-DPO − DPO | ") and "nats" not in line]
    assert any("**" in row for row in rows[-1:]) == (verdict in ("confirmed", "opposite"))
    assert "Confirmation on a second model" not in report.page(load(tmp_path))
