"""The benchmark of generation, on a few prompts: every way answers, and continuous batches as each prompt alone."""

import json
import sys

from bdpo_pl import embedded
from benchmarks import generation
from benchmarks.generation import CONTINUOUS, FIRST


def test_every_way_answers_and_continuous_batches_as_each_prompt_alone(tmp_path, monkeypatch, capsys):
    suite = f"safe:benign={embedded.BENIGN_PROMPTS_FILE}"
    sizes = ["--prompts", "4", "--new-tokens", "3", "--batch-size", "2", "--plain-batch-size", "2", "--rounds", "1"]
    places = ["--model", str(embedded.MODEL_DIR), "--suite", suite, "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.generation", *places, *sizes, "--alone"])
    generation.main()
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-cpu-generation.json"))
    (row,) = report["rows"]
    assert row["tokens_per_s"].keys() == row["generated"].keys() == set(FIRST)
    assert all(0 < tokens <= 4 * 3 for tokens in row["generated"].values())
    assert row["as_alone"][CONTINUOUS] == row["prompts"] == 4
    assert f"| {CONTINUOUS} | 2 |" in capsys.readouterr().out
