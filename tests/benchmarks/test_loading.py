"""The measurements of loading: what they count, on rows of our own."""

import json

import pytest
from makers import build_tokenizer, write_jsonl

from benchmarks import loading

ROWS = [
    {"chosen": f"\n\nHuman: how {i} ?\n\nAssistant: so .", "rejected": f"\n\nHuman: how {i} ?\n\nAssistant: no {i} ."}
    for i in range(6)
]
EMPTY = {"chosen": "\n\nHuman: how ?\n\nAssistant: so .", "rejected": "\n\nHuman: how ?\n\nAssistant: "}


@pytest.fixture
def given(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer", write_jsonl(tmp_path / "pairs.jsonl", [*ROWS, EMPTY])


def test_every_pair_is_compared_and_every_refusal_counted(given, capsys, monkeypatch):
    tokenizer, pairs = given
    loading.main(["--tokenizer", str(tokenizer), "--pairs", str(pairs), "--prove"])
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["pairs"], found["differences"]) == (7, 6, {})
    assert found["refused"] == {"empty response": 1}
    # A comparison that finds nothing in a wrong table would prove nothing.
    right = loading.load_pairs

    def wrong(*args, **kwargs):
        table, report = right(*args, **kwargs)
        table.tokens[0] += 1
        table.tokens[-2] += 1
        return table, report

    monkeypatch.setattr(loading, "load_pairs", wrong)
    loading.main(["--tokenizer", str(tokenizer), "--pairs", str(pairs), "--prove"])
    assert json.loads(capsys.readouterr().out)["differences"] == {"prompt": 1, "response": 1}


def test_rows_are_repeated_without_repeating_a_pair(given, capsys):
    tokenizer, pairs = given
    loading.main(["--tokenizer", str(tokenizer), "--pairs", str(pairs), "--rows", "21"])
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 18
    assert found["seconds"] > 0
