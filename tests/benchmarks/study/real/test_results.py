"""The results' page of the study with a real model: the registered rule on invented records, and its tables."""

import json

import pytest
from scipy import stats

from bdpo_pl.errors import InputError
from benchmarks.study.real import plan, report, results

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


def records(seeds=plan.SEEDS, **better):
    """All cells; `better` says by how much B-DPO differs from the others in an outcome."""
    trials = [{"key": c.key, "cell": as_fields(c), "pairs": dict(BASE), "seconds": 3600.0} for c in plan.tuning()]
    best = plan.chosen({trial["key"]: trial for trial in trials})
    yield {"key": plan.reference().key, "cell": as_fields(plan.reference()), "suites": dict(RATES), "seconds": 0.0}
    yield from trials
    for cell in plan.final(best):
        if cell.seed not in seeds:
            continue
        shared, own = SHARED[cell.seed], OWN[cell.seed] if cell.method == "B-DPO" else 0.0
        moved = better if cell.method == "B-DPO" else {}
        pairs, suites = (
            {name: value + shared + own + moved.get(name, 0.0) for name, value in of.items()} for of in (BASE, RATES)
        )
        yield {"key": cell.key, "cell": as_fields(cell), "pairs": pairs, "suites": suites, "seconds": 0.0}
    for cell in plan.halves(best) if len(seeds) == 5 else ():
        wider = OWN[cell.seed] + 1.0 if cell.half == "imbalanced" else 0.0
        pairs = BASE | {"gap/margin": BASE["gap/margin"] + SHARED[cell.seed] + wider, "train_probe/margin": 2.0}
        yield {"key": cell.key, "cell": as_fields(cell), "pairs": pairs, "halves": dict(ALIKE), "seconds": 0.0}


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
        # Test pairs and safe prompts alone decide nothing.
        ({"held_out/logp_accuracy": 0.2}, "not told"),
    ],
)
def test_the_registered_rule(tmp_path, better, verdict):
    assert results.answer(load(tmp_path, **better)).verdict == verdict


def test_differences_are_paired_by_seed(tmp_path):
    found = results.answer(load(tmp_path, **{"gap/margin": -0.5})).found[results.GAP.name]
    # What all methods have in common of a seed is in neither mean nor interval.
    t = stats.ttest_1samp([own - 0.5 for own in OWN], 0.0)
    low, high = t.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.4998, low, high))
    assert found.p == pytest.approx(t.pvalue)


def test_no_answer_before_every_seed_is_there(tmp_path):
    loaded = load(tmp_path, seeds=(0, 1, 2), **{"gap/margin": -0.5})
    assert results.answer(loaded).verdict == "not finished"
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
    assert (
        "| imbalanced half − balanced half | 0.00 [0.00, 0.00] | 0.00 [0.00, 0.00] | **+1.00 [1.00, 1.00]** |" in page
    )


def test_a_rate_before_training_that_cannot_fall_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(RATES, "xstest_benign", 0.02)
    monkeypatch.setitem(RATES, "xstest_harmful", 0.98)
    monkeypatch.setitem(RATES, "strongreject", 0.96)
    assert report.limits(load(tmp_path)) == [
        "harmful prompts refused: 97.0 % before training, a ceiling (over 95 %)",
        "safe prompts refused: 2.0 % before training, a floor (under 5 %)",
    ]


def test_page_and_figure_are_written_and_the_same_again(tmp_path):
    pytest.importorskip("matplotlib")
    load(tmp_path)
    written = [report.write(tmp_path / "records.jsonl", tmp_path / f"{i}" / "page.md") for i in range(2)]
    assert [path.name for path in written[0]] == ["page.md", "methods.svg"]
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert "![Every method" in written[0][0].read_text()


def test_what_is_no_file_of_records_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no such file; run `python -m benchmarks.study.real` first"):
        results.load_real(tmp_path / "none.jsonl")
