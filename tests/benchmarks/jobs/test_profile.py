"""The profile of training counts every operation once, to the right kind of work."""

from argparse import Namespace

import pytest
import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl

from benchmarks.jobs.profile import KINDS, MarkedAdamW, markdown, profiled, shares

LAYERS, HEAD, ATTENTION, UPDATE, REST = KINDS


def test_operations_are_counted_to_their_kind():
    hidden, weight, head = torch.randn(64, 32), torch.randn(32, 32, requires_grad=True), torch.randn(32, 401)
    optimizer = MarkedAdamW([weight], lr=0.1)
    with torch.profiler.profile(record_shapes=True, with_flops=True) as profile:

        def closure():
            heads = (hidden @ weight).reshape(1, 4, 64, 8)
            attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
            loss = (attended.reshape(64, 32) @ head).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    events = list(profile.events())
    seconds, rate = shares(events, vocabulary=401)
    assert sum(seconds.values()) == pytest.approx(sum(event.self_cpu_time_total for event in events) / 1e6)
    assert min(seconds.values()) > 0
    # Forward, and the gradient of the weight; the hidden states need none.
    assert rate * seconds[LAYERS] == pytest.approx(2 * 2 * 64 * 32 * 32)
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_a_run_is_profiled(tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(12))
    row = profiled(
        Namespace(
            model=tmp_path / "model", data=tmp_path / "pairs.jsonl", compile=None, batch_size=4, max_length=128, steps=2
        ),
        tmp_path / "scores",
    )
    assert row["seconds"].keys() == set(KINDS)
    assert 0 < row["tokens"] <= row["positions"]
    assert 0 < sum(row["seconds"].values()) < 2 * row["steps_s"]
    assert f"| {UPDATE} | " in markdown(row)
