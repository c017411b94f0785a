"""Imbalance of real pairs: the pairs made of labelled answers, the diagnoses that are kept, and their tables."""

import gzip
import json

import children
import numpy as np
import pytest
from makers import build_model, build_tokenizer
from scipy import stats

from bdpo_pl.comprehension import ESTIMATORS
from benchmarks.study.real import cell, imbalance, report


@pytest.fixture
def data(tmp_path):
    """Pairs and labelled answers in the layouts of the published files."""
    for folder in ("preferences", "judges"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    with gzip.open(tmp_path / "data" / cell.PAIRS, "wt") as file:
        for i in range(30):
            asked = f"\n\nHuman: how do i keep {i} snails ?\n\nAssistant:"
            row = {"chosen": f"{asked} set traps .", "rejected": f"{asked} read the label {i} ."}
            file.write(json.dumps(row) + "\n")
    answers = [
        ("a", "refusal", "no .", "x"), ("a", "compliance", "water the plant .", "y"), ("a", "refusal", "second .", "x"),
        ("b", "refusal", "no .", "x"),
        ("c", "compliance", "read the label .", "x"), ("c", "refusal", "never .", "x"),
    ]  # fmt: skip
    with gzip.open(tmp_path / "data" / imbalance.LABELLED, "wt") as file:
        for prompt, label, response, case in answers:
            file.write(json.dumps({"prompt": prompt, "label": label, "response": response, "case": case}) + "\n")
    return tmp_path / "data"


def test_pairs_of_labelled_answers_are_of_one_prompt_with_the_refusal_chosen(data):
    assert imbalance.refusals(data) == [
        {"prompt": "a", "chosen": "no .", "rejected": "water the plant .", "category": "y"},
        {"prompt": "c", "chosen": "never .", "rejected": "read the label .", "category": "x"},
    ]


def test_estimators_are_compared_pair_by_pair():
    rng = np.random.default_rng(0)
    first = rng.normal(size=50)
    second = first + rng.normal(size=50)
    (found,) = imbalance.agreement({"pmi": first, "ifd": second})
    assert found["estimators"] == ["pmi", "ifd"]
    assert found["spearman"] == pytest.approx(stats.spearmanr(first, second).statistic)
    assert found["same_sign"] == np.mean(first * second > 0)


def test_sizes_are_read_from_ratios_of_weights():
    ratios = {name: np.exp(size / 0.25) for name, size in (("median", 0.4), ("p95", 2.0), ("largest", 4.8))}
    assert report.sizes({"temperatures": [{"tau": 0.25, **ratios}]}) == pytest.approx([0.4, 2.0, 4.8])


def run(name, *options):
    done = children.command(f"bdpo_pl.{name}", options)
    assert done.returncode == 0, done.stderr


def test_every_estimator_is_measured_and_shown(data, tmp_path, monkeypatch):
    monkeypatch.setattr(imbalance, "run_command", run)
    monkeypatch.setattr(cell, "HELD_OUT", 4)
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    imbalance.main(
        ["--model", f"tiny={tmp_path / 'model'}", "--data", str(data), "--folder", str(tmp_path / "cache"),
         "--out", str(out), "--pairs", "12"]
    )  # fmt: skip
    (file,) = out.iterdir()
    rows = json.loads(file.read_text())["rows"]
    measured = [(row["set"], row["estimator"], row["pairs"]) for row in rows if "estimator" in row]
    assert measured == [(name, e, n) for name, n in (("hh", 12), ("refusals", 2)) for e in ESTIMATORS]
    for row in rows:
        if "estimator" in row:
            difference = row["chosen"]["value"] - row["rejected"]["value"]
            assert row["imbalance"]["value"] == pytest.approx(difference, abs=1e-6)
    by_name = {row["estimator"]: row for row in rows if row.get("set") == "hh" and "estimator" in row}
    # A sum over tokens is larger than its mean a token.
    assert by_name["pmi_sum"]["size"] > 2 * by_name["pmi"]["size"]
    assert {group["name"] for row in rows if row["set"] == "refusals" for group in row.get("categories", ())} == {
        "x",
        "y",
    }
    text = file.read_text()
    assert "snails" not in text
    assert "water the plant" not in text
    assert report.imbalance_table(rows).count("tiny, HH-RLHF") == 4
    assert "`pmi` and `hsic`" in report.agreement_table(rows)
    assert report.temperature_table(rows).count("tiny") >= 4
    categories = report.category_table(rows).splitlines()[2:]
    assert [line.split(" | ")[:3] for line in categories] == [
        ["| tiny, refusal against compliance", f"`{name}`", "1"] for name in ("x", "y")
    ]
    assert report.category_table([row for row in rows if row["set"] == "hh"]) == ""
