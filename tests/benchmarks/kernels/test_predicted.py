"""The parts of the fused loss are seen as they are called; the table has both numbers. Here on a CPU."""

import sys

import pytest
import torch

from benchmarks.calculated.kernels import H200, Counted, predict
from benchmarks.kernels import predicted
from benchmarks.kernels.problem import Shape, make_problem

SHAPE = Shape("small", 64, 16, 100, 8)


@pytest.mark.parametrize("frozen", [False, True])
def test_every_part_is_seen_with_the_work_that_it_did(frozen):
    problem = make_problem(SHAPE, "cpu")
    calls = predicted.observe(predicted.fused_loss(problem, frozen=frozen), "cpu")
    step = predicted.counted(calls, SHAPE.D, SHAPE.V)
    # In float32 the gradient overwrites the logits: one block, eight bytes read and written of each.
    assert step == Counted(
        chunks=(64,), blocks=(64,), D=16, V=100, trains_head=not frozen, wide_gradient=False, logits_bytes=4,
        row_bytes=8, scaling_pass=False, waits=0,
    )  # fmt: skip
    assert all(call.seconds > 0 for call in calls)
    # What is watched is put back.
    assert len(predicted.observe(predicted.fused_loss(problem), "cpu")) == 4


def test_half_precision_logits_are_seen_in_both_widths():
    problem = make_problem(Shape("half", 64, 16, 100, 8, dtype=torch.bfloat16), "cpu")
    exact, rounded = (
        predicted.counted(predicted.observe(predicted.fused_loss(problem, exact=exact), "cpu"), 16, 100)
        for exact in (True, False)
    )
    assert (exact.logits_bytes, rounded.logits_bytes) == (4, 2)
    assert rounded.row_bytes == 4


def test_parts_and_overhead_add_up_to_the_whole_beside_the_models_own_numbers():
    row = predicted.compare(H200, make_problem(SHAPE, "cpu"), "trained head", "cpu")
    parts = {part: time for part, time in row["measured_s"].items() if part != "total"}
    assert sum(parts.values()) == pytest.approx(row["measured_s"]["total"])
    assert parts.keys() < row["predicted_s"].keys()
    assert row["predicted_s"]["total"] == predict(H200, Counted(**row["work"])).total
    table = predicted.markdown(row)
    assert "| small, trained head | predicted, ms | measured, ms | ratio |" in table
    assert table.count("\n|") == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_names_the_command_that_needs_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.kernels.predicted"])
    with pytest.raises(SystemExit):
        predicted.main()
    assert "`python -m benchmarks.calculated.kernels` predicts alone" in capsys.readouterr().err
