"""The data and model that ship with the package."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from bdpo_pl import embedded
from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.embedded.make import framings
from bdpo_pl.embedded.make.data import all_acts, write
from bdpo_pl.embedded.make.topics import HELD_OUT_RISKS
from bdpo_pl.forward.generation import generate_responses
from bdpo_pl.models.loading import ModelSource, load_model, load_tokenizer
from bdpo_pl.refusals import is_refusal, refusal_rate

PROMPT_FILES = (embedded.HARMFUL_PROMPTS_FILE, embedded.JAILBREAK_PROMPTS_FILE, embedded.BENIGN_PROMPTS_FILE)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSource(str(embedded.MODEL_DIR)))


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSource(str(embedded.MODEL_DIR)), torch.float32).eval()


def test_script_writes_the_shipped_bytes(tmp_path):
    for path in write(tmp_path):
        assert path.read_bytes() == (embedded.TRAIN_FILE.parent / path.name).read_bytes(), path.name


def test_no_row_twice_and_no_held_out_act_in_training():
    train, held_out = rows(embedded.TRAIN_FILE), rows(embedded.HELD_OUT_FILE)
    assert (len(train), len(held_out)) == (1200, 240)
    assert Counter(row["kind"] for row in train) == {"harmful": 800, "benign": 200, "look_alike": 200}
    for some in (train, held_out, *map(rows, PROMPT_FILES)):
        assert len({row["prompt"] for row in some}) == len(some)
    texts = "\n".join(f"{row['prompt']}\n{row['chosen']}\n{row['rejected']}" for row in train)
    for act in all_acts():
        if act.held_out:
            assert act.text not in texts, act.text
    assert not HELD_OUT_RISKS & {row["category"] for row in train}
    assert {row["category"] for row in held_out} >= HELD_OUT_RISKS


def test_chosen_refuse_harm_and_help_the_rest():
    for row in rows(embedded.TRAIN_FILE) + rows(embedded.HELD_OUT_FILE):
        if row["kind"] == "harmful":
            assert is_refusal(row["chosen"]), row
            assert not is_refusal(row["rejected"]), row
        else:
            assert not is_refusal(row["chosen"]), row


def test_jailbreak_framings_are_unseen():
    assert not set(framings.SEEN) & set(framings.UNSEEN)
    prompts = [row["prompt"] for row in rows(embedded.JAILBREAK_PROMPTS_FILE)]
    for framing in framings.UNSEEN:
        head, tail = framing.split("{question}")
        assert any(prompt.startswith(head) and prompt.endswith(tail) for prompt in prompts)


def test_package_data_stays_small():
    files = [path for path in Path(embedded.__file__).parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") < 10_000_000


def test_model_is_of_the_promised_size_and_kind(model):
    assert model.config.model_type == "qwen2"
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000


def test_pairs_load_whole_with_their_prompts_tokens_a_prefix(tokenizer):
    for path in (embedded.TRAIN_FILE, embedded.HELD_OUT_FILE):
        table, report = load_pairs("train", str(path), PairTokenizer(tokenizer), Truncation(128), LoadOptions())
        assert len(table) == report.read
        assert report.notes["rendered with the chat template"] == f"{len(table):,}"
        assert not [note for note in report.notes if "merged" in note or "cut" in note]


def test_model_answers_both_kinds_and_ends_its_answers(model, tokenizer):
    harmful = generate_responses(model, tokenizer, [r["prompt"] for r in rows(embedded.HARMFUL_PROMPTS_FILE)])
    # Something to align: it refuses some of what it should, and complies with the rest.
    assert 0.1 < refusal_rate(harmful) < 0.6
    benign = generate_responses(model, tokenizer, [r["prompt"] for r in rows(embedded.BENIGN_PROMPTS_FILE)])
    assert 0.05 < refusal_rate(benign) < 0.4
    longest = max(len(tokenizer(response)["input_ids"]) for response in harmful + benign)
    assert longest < 100  # of 128: all ended by the model itself
