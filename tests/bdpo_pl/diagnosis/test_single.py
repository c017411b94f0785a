"""Diagnosis of single answers with a label: numbers by hand and by transformers, and refusals by name."""

import json
import math
import re

import numpy as np
import pytest
import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from bdpo_pl import diagnose
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.diagnosis.single import SingleDiagnosis, diagnose_single, label_balance, measures
from bdpo_pl.diagnosis.single_page import findings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and single answers: both responses of 15 pairs, of which the first is good, and one with both labels."""
    folder = tmp_path_factory.mktemp("single")
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in preference_rows(15)
        for side in ("chosen", "rejected")
    ]
    write_jsonl(folder / "single.jsonl", [*rows[:9], {**rows[0], "label": False}, *rows[9:]])
    return folder


def command(folder, *options):
    diagnose.main([
        f"--model.policy={folder / 'model'}", f"--data.train={folder / 'single.jsonl'}", "--model.loss=KTOLoss",
        "--data.held_out_fraction=0", "--trainer.accelerator=cpu", f"--model.scoring.cache_dir={folder / 'cache'}",
        f"--diagnose.folder={folder / 'out'}", *options,
    ])  # fmt: skip


def test_answers_are_rated_as_by_transformers(folder, capsys):
    command(folder, "--model.loss.undesirable_weight=0.5")
    rows = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    source = [json.loads(line) for line in (folder / "single.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [row["label"] for row in source]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for row, given in list(zip(rows, source, strict=True))[:4]:
        turn = [{"role": "user", "content": given["prompt"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(
            [*turn, {"role": "assistant", "content": given["completion"]}], tokenize=False
        )
        ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        end = start + int(row["tokens"])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        expected = logps[range(start - 1, end - 1), ids[0, start:end]].sum().item()
        assert row["logp"] == pytest.approx(expected, abs=1e-3)
        assert row["logp_per_token"] == pytest.approx(expected / row["tokens"], abs=1e-4)
    numbers = json.loads((folder / "out" / "diagnosis.json").read_text())
    train = numbers["splits"]["train"]
    assert (train["good"], train["bad"], train["contradicted"], train["repeated"]) == (15, 16, 2, 0)
    good = np.array([row["comprehension"] for row in rows if row["label"]])
    assert train["means"]["comprehension"]["good"]["value"] == pytest.approx(good.mean())
    assert numbers["balance"]["value"] == pytest.approx(15 / 8)
    printed = " ".join(capsys.readouterr().out.split())
    # 15 good answers to 16 bad ones: λ_U from 15 / 16 · 3 / 4 to 15 / 16.
    assert "--model.loss.undesirable_weight to a value from 0.704 to 0.937" in printed.replace("│", "").replace(
        "  ", " "
    )
    page = (folder / "out" / "report.html").read_text()
    assert "2 training answers (6.5%) have both labels." in page
    assert source[0]["completion"] not in page


@pytest.mark.parametrize("option", ["strong_ratio=2", "extremes=3", "show_texts=true"])
def test_what_needs_pairs_is_refused_by_name(folder, capsys, option):
    with pytest.raises(SystemExit) as stopped:
        command(folder, f"--diagnose.{option}")
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"diagnose.{option.split('=')[0]} is about the two responses of a pair, but model.loss is KTOLoss" in said


@pytest.mark.parametrize("good", [3, 40, 100, 133, 134, 900])
@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (0.5, 2.0)])
def test_the_suggested_weight_balances_the_labels(good, desirable, undesirable):
    bad = 100
    found = label_balance(good, bad, desirable, undesirable)
    assert found.value == pytest.approx(desirable * good / (undesirable * bad))
    if found.option is None:
        assert 1 <= found.value <= 4 / 3
        return
    ends = []
    for weight in (found.low, found.high):
        weights = {"desirable_weight": desirable, "undesirable_weight": undesirable, found.option: weight}
        ends.append(weights["desirable_weight"] * good / (weights["undesirable_weight"] * bad))
    assert sorted(ends) == pytest.approx([1, 4 / 3])


@pytest.mark.parametrize(("good", "bad"), [(810, 1000), (1000, 31), (7, 90000)])
def test_weights_that_follow_the_advice_balance_the_labels(good, bad):
    (notice,) = findings(SingleDiagnosis({}, "", {}, label_balance(good, bad, 1.0, 1.0), []))
    option, *ends = re.search(r"--model.loss.(\w+) to a value from ([\d.]+) to ([\d.]+)\.", notice.detail).groups()
    for end in map(float, ends):
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, option: end}
        assert label_balance(good, bad, **weights).option is None


def test_labels_that_are_missing_have_no_balance():
    assert label_balance(5, 0, 1.0, 1.0).value is None
    assert label_balance(5, 5, 1.0, 0.0).value is None
    assert label_balance(0, 5, 1.0, 1.0).option is None


def table_of(answers, labels):
    pairs = [PreferencePair([prompt], answer, [99]) for prompt, answer in answers]
    table = PairTable.from_pairs(pairs, [0])
    return type(table)(**{**table.__dict__, "desirable": np.array(labels)})


def test_means_differences_and_repeats():
    answers = [(1, [5] * (1 + i % 4)) for i in range(24)]
    table = table_of(answers, [i % 2 == 0 for i in range(24)])
    comprehension = np.stack([np.arange(24.0), np.zeros(24)])
    values = measures(table, comprehension, -comprehension)
    train = table_of([(1, [7]), (2, [8])], [True, False])
    found = diagnose_single(table, values, train)
    # Lengths 1 and 3 are good, 2 and 4 bad, six times each; all have the training prompt 1.
    assert (found.good, found.bad, found.repeated, found.contradicted, found.shared_prompts) == (12, 12, 20, 0, 24)
    difference = found.means["comprehension"]["good − bad"]
    assert difference.value == -1
    good, bad = np.arange(0, 24, 2), np.arange(1, 24, 2)
    error = math.sqrt(good.var(ddof=1) / 12 + bad.var(ddof=1) / 12)
    assert difference.high - difference.value == pytest.approx(1.96 * error, rel=1e-3)
    assert found.means["tokens"]["bad"].value == 3
    few = diagnose_single(table_of(answers[:4], [True, False] * 2), {"tokens": np.arange(4.0)}, None)
    assert math.isnan(few.means["tokens"]["good − bad"].low)
    assert few.shared_prompts is None
