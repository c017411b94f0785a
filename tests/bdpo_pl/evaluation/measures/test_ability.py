"""General ability: the forms that count as helpful, and lm-evaluation-harness on a task of our own."""

import builtins
import functools
import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from makers import build_model, build_tokenizer, large, write_jsonl
from scipy.stats import binomtest

import bdpo_pl.evaluation.measures.ability as ability
from bdpo_pl import embedded
from bdpo_pl.embedded.make.data import all_acts, helpful, unhelpful
from bdpo_pl.embedded.make.responses import EVASIONS, HELPFUL, OVER_REFUSALS
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.measures.ability import AbilityOptions, check, measure_ability

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = [
    {"question": f"question {i} how do i keep", "choices": [" my garden", " the slugs", " a label"], "label": i % 3}
    for i in range(8)
]


def test_every_helpful_answer_has_a_form_and_no_other_answer_does():
    rng = random.Random(0)
    acts = [act for act in all_acts() if act.kind != "harmful"]
    assert len(acts) > 100
    for act in acts:
        assert ability._HELPFUL.fullmatch(helpful(act, rng))
        assert not ability._HELPFUL.fullmatch(unhelpful(act, rng))
        for template in OVER_REFUSALS + EVASIONS:
            assert not ability._HELPFUL.fullmatch(template.format(act=act.text))


@pytest.mark.parametrize("form", HELPFUL)
def test_form_that_is_cut_off_does_not_count(form):
    whole = form.format(act="plant a tree", first="dig", then="plant", last="water it")
    assert ability._HELPFUL.fullmatch(whole)
    for part in (whole[:-1], whole[: len(whole) // 2], whole[1:], ""):
        assert not ability._HELPFUL.fullmatch(part)


def test_built_in_check_counts_answers_and_scores_the_chosen_ones(monkeypatch):
    rows = [json.loads(line) for line in embedded.HELD_OUT_FILE.read_text().splitlines()]
    benign = [row for row in rows if row["kind"] == "benign"]
    monkeypatch.setattr(
        ability, "generate_responses",
        lambda model, tokenizer, prompts, **_: [
            row["chosen"] if i % 4 else "That depends." for i, row in enumerate(benign) if prompts[i] == row["prompt"]
        ],
    )  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL_DIR).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL_DIR)
    helped, likelihood = measure_ability(AbilityOptions(embedded=True), model, tokenizer)
    assert (helped.value.value, helped.value.count, helped.percent) == (0.75, len(benign), True)
    asked = [row for row in rows if row["kind"] != "harmful"]
    assert likelihood.value.count == len(asked)
    assert not likelihood.percent
    by_hand = []
    for row in asked:
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(turn, add_special_tokens=False)["input_ids"]
        whole = tokenizer(turn + row["chosen"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        at = torch.arange(len(ids), len(whole))
        by_hand.append(logp[at - 1, torch.tensor(whole)[at]].mean().item())
    assert likelihood.value.value == pytest.approx(np.mean(by_hand), abs=2e-4)
    assert likelihood.value.low < likelihood.value.value < likelihood.value.high < 0


def test_nothing_is_measured_that_was_not_asked_for():
    assert measure_ability(AbilityOptions(), None, None) == []
    check(AbilityOptions())


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"num_fewshot": -1}, {"batch_size": 0}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(InputError, match=rf"ability\.{next(iter(wrong))} must be at least"):
        AbilityOptions(**wrong)


def test_harness_that_is_not_installed(monkeypatch):
    imports = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r'pip install "bdpo-pl\[eval\]"'):
        check(AbilityOptions(lm_eval=["gsm8k"]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder with a task of multiple choice whose data are a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = write_jsonl(folder / "data.jsonl", QUESTIONS)
    (folder / "mine.yaml").write_text(TASK.format(name="bdpo_mine", file=data))
    return folder


@pytest.fixture
def harness(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets
    import lm_eval.tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Without the thousands of tasks that come with it, whose files take seconds to read.
    alone = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", alone)
    monkeypatch.setattr(ability, "_MANAGERS", {})


def test_harness_on_a_task_of_our_own(harness, tasks):
    model, tokenizer = large(build_model()).eval(), build_tokenizer()
    options = AbilityOptions(lm_eval=["bdpo_mine"], include_path=str(tasks), batch_size=3)
    check(options)
    (found,) = measure_ability(options, model, tokenizer)
    right = []
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(row["question"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            at = torch.arange(len(ids), len(whole))
            scores.append(logp[at - 1, torch.tensor(whole)[at]].sum().item())
        right.append(float(np.argmax(scores) == row["label"]))
    assert found.name == "lm_eval bdpo_mine, acc"
    assert (found.value.value, found.value.count) == (pytest.approx(np.mean(right)), 8)
    # Wilson's ends are 1.96 of their own standard errors away; the harness divides by n − 1.
    for end in (found.value.low, found.value.high):
        assert abs(np.mean(right) - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 7))
    assert (found.percent, found.higher_is_better) == (True, True)
    (few,) = measure_ability(AbilityOptions(lm_eval=["bdpo_mine"], include_path=str(tasks), limit=5), model, tokenizer)
    assert (few.value.value, few.value.count) == (pytest.approx(np.mean(right[:5])), 5)


@pytest.fixture
def told(monkeypatch):
    """Measures of a harness that tells what the test writes: metric → (value, standard error)."""

    def measures(count=50, **metrics):
        results = {"alias": "t"}
        for metric, (value, error) in metrics.items():
            results |= {f"{metric},none": value, f"{metric}_stderr,none": error}
        evaluation = {"results": {"t": results}, "n-samples": {"t": {"effective": count}} if count else {}}
        harness = SimpleNamespace(simple_evaluate=lambda **_: evaluation)
        monkeypatch.setattr(ability, "_tasks", lambda options: (harness, None))
        huggingface = SimpleNamespace(HFLM=lambda **_: None)
        monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace(huggingface=huggingface))
        monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
        return {a.name.split(", ")[1]: a for a in measure_ability(AbilityOptions(lm_eval="t"), None, None)}

    return measures


def test_only_shares_are_in_percent_whatever_their_value(told):
    found = told(bits_per_byte=(0.8, 0.01), acc=(0.8, 0.05), exact_match=(0.0, 0.0), f1=(0.5, 0.1))
    assert {name: a.percent for name, a in found.items()} == {
        "bits_per_byte": False, "acc": True, "exact_match": True, "f1": False
    }  # fmt: skip
    assert not told(bits_per_byte=(1.02, 0.01))["bits_per_byte"].percent
    # No share at all, whatever the task calls it.
    assert not told(acc=(80.0, 1.0))["acc"].percent


def test_answers_that_are_all_right_or_all_wrong_are_not_certain(told):
    def ends(value, error, **options):
        interval = told(acc=(value, error), **options)["acc"].value
        return interval.low, interval.high

    assert ends(0.0, 0.0) == pytest.approx((0.0, 1.959964**2 / (50 + 1.959964**2)))
    assert ends(1.0, 0.0) == pytest.approx((50 / (50 + 1.959964**2), 1.0))
    # One of fifty right: not below 0, and not more certain than none.
    low, high = ends(0.02, (0.02 * 0.98 / 49) ** 0.5)
    assert 0 < low < 0.02
    assert high > ends(0.0, 0.0)[1]
    # A group of tasks has no number of its own, and a metric may have no error.
    assert np.isnan(ends(0.0, 0.0, count=0)).all()
    assert np.isnan(ends(0.5, "N/A")).all()
    assert ends(0.5, 0.05, count=0) == pytest.approx(binomtest(50, 100).proportion_ci(method="wilson"), abs=1e-6)
    # Nothing is known of the error of other numbers that are all alike.
    numbers = told(f1=(0.0, 0.0), bits_per_byte=(0.8, 0.01))
    assert not numbers["f1"].value.bounded
    assert numbers["bits_per_byte"].value.low == pytest.approx(0.8 - 0.01959964)


def test_unknown_task_is_found_before_any_model_is_loaded(harness, tasks):
    with pytest.raises(InputError, match=r"no task nosuch_task; .*ability\.include_path"):
        check(AbilityOptions(lm_eval=["bdpo_mine", "nosuch_task"], include_path=str(tasks)))
    with pytest.raises(InputError, match=r"ability\.include_path.*nowhere"):
        check(AbilityOptions(lm_eval=["bdpo_mine"], include_path=str(tasks / "nowhere")))
