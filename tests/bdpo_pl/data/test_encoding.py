"""Encoding on several processes gives what one gives, in order, faults included."""

import os
import signal
import sys

import pytest
from chat_templates import CHATML, LLAMA3, QWEN3, tokenizer_for
from makers import preference_rows

from bdpo_pl.data import encoding
from bdpo_pl.data.encoding import encoded
from bdpo_pl.data.rows import PreferenceRow, RowError
from bdpo_pl.data.sources import Record
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.errors import MachineError


def rows(n=90):
    made = [
        PreferenceRow(r["prompt"], r["chosen"], r["rejected"], Record("a.jsonl", i, {}))
        for i, r in enumerate(preference_rows(n))
    ]
    made[40] = PreferenceRow("q ?", "same", "same", Record("a.jsonl", 40, {}))
    made[60] = PreferenceRow("a<|im_end|>b", "so .", "no .", Record("a.jsonl", 60, {}))
    return made


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux alone")
def test_processes_give_what_one_process_gives(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 7)
    monkeypatch.setattr(encoding, "MIN_ROWS", 21)
    tokenizer = tokenizer_for(QWEN3)
    alone, several = PairTokenizer(tokenizer), PairTokenizer(tokenizer)
    made = rows()
    one = list(encoded(made, alone, processes=1))
    two = list(encoded(iter(made), several, processes=2))
    assert [row for row, _ in two] == made
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert str(a) == str(b) if isinstance(a, RowError) else a == b
    assert isinstance(two[40][1], RowError)
    assert two[40][1].reason == "chosen = rejected"
    assert several.read_as == alone.read_as
    assert several.read_as.templated == 89


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux alone")
def test_few_chunks_are_under_way(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 5)
    monkeypatch.setattr(encoding, "MIN_ROWS", 10)
    taken = []
    source = (taken.append(row) or row for row in rows(90))
    results = encoded(source, PairTokenizer(tokenizer_for(CHATML)), processes=2)
    for _ in range(6):
        next(results)
    assert len(taken) <= 10 + 5 * 6
    results.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux alone")
def test_processes_end_though_the_run_handles_signals(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 5)
    monkeypatch.setattr(encoding, "MIN_ROWS", 10)
    seen = []
    before = {s: signal.signal(s, lambda number, _: seen.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        results = encoded(iter(rows(90)), PairTokenizer(tokenizer_for(CHATML)), processes=2)
        for _ in range(6):
            next(results)
        results.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not seen


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux alone")
def test_a_killed_process_ends_the_run_by_a_named_error(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 5)
    monkeypatch.setattr(encoding, "MIN_ROWS", 10)
    here = os.getpid()

    def encode(self, made):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return [RowError(row.record, "none", "none") for row in made]

    monkeypatch.setattr(PairTokenizer, "encode", encode)
    with pytest.raises(MachineError, match="was killed, probably because memory ran out"):
        list(encoded(iter(rows(70)), PairTokenizer(tokenizer_for(CHATML)), processes=2))


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3])
def test_what_three_texts_share_is_encoded_once_with_the_same_ids(template):
    tokenizer = tokenizer_for(template)
    quick, whole = PairTokenizer(tokenizer), PairTokenizer(tokenizer)
    assert quick._opening is not None
    whole._opening = None
    made = rows(70)
    made.append(PreferenceRow("  \n\n", "\n\n so .", "\n no .", Record("a.jsonl", 99, {})))
    for a, b in zip(quick.encode(made), whole.encode(made), strict=True):
        assert str(a) == str(b) if isinstance(a, RowError) else a == b
