"""The examples of the kernels run as they are."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_kernels_alone_learn_and_start_at_log_2():
    losses = runpy.run_path(str(EXAMPLES / "kernels_alone.py"))["main"](steps=20)
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.2


def test_kernels_in_trl_take_the_steps_that_trl_takes(monkeypatch, tmp_path):
    trl = pytest.importorskip("trl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    example = runpy.run_path(str(EXAMPLES / "kernels_in_trl.py"))["main"]
    ours = example(max_steps=3)
    theirs = example(trl.DPOTrainer, max_steps=3)
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert ours[-1] < ours[0]
