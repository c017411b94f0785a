"""The benchmark itself, end to end at a shape of no consequence."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from children import command

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_contender_is_measured_or_listed_with_its_reason(tmp_path):
    options = ["--device", "cpu", "--shapes", "tiny", "--rounds", "1"]
    options += ["--repeats", "1", "--out", str(tmp_path), "--only", "naive", "ours", "ours, fused loss",
                "ours, linear logprob", "QuACK cross_entropy"]  # fmt: skip
    result = command("benchmarks.kernels", options)
    assert result.returncode == 0, result.stderr
    assert "| QuACK cross_entropy | not run: " in result.stdout
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["versions"]["torch"]
    measured = [row for row in report["rows"] if "not_run" not in row]
    assert {(row["task"], row["contender"]) for row in measured} == {
        ("linear", "naive"), ("linear", "ours, fused loss"), ("linear", "ours, linear logprob"),
        ("logits", "naive"), ("logits", "ours"),
    }  # fmt: skip
    for row in measured:
        assert row["time_s"] > 0
        assert row["deviation"] < 1e-5


def test_unknown_contender_is_refused():
    result = command("benchmarks.kernels", ["--only", "nobody"])
    assert result.returncode == 2
    assert "unknown contenders ['nobody']" in result.stderr


def test_a_peer_that_is_not_installed_is_listed_without_a_process(monkeypatch):
    from benchmarks.kernels import __main__ as benchmark
    from benchmarks.kernels import contenders
    from benchmarks.kernels.problem import find_shape

    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "child", lambda *arguments: pytest.fail("a process was started"))
    found = benchmark.measured("linear", find_shape("tiny"), "TRL ChunkedLogProbFunction", "cpu", 1)
    assert found == {"not_run": "trl is not installed"}


@pytest.mark.parametrize("contender", ["Liger fused linear CE, CuTe", "QuACK linear CE"])
def test_kernels_for_hopper_say_that_they_need_one(contender):
    from benchmarks.kernels.contenders import LINEAR, NotRunError
    from benchmarks.kernels.problem import find_shape, make_problem

    with pytest.raises(NotRunError, match="Hopper"):
        LINEAR[contender](make_problem(find_shape("tiny"), "cpu"))


def test_rounded_logits_are_a_contender_in_half_precision_alone():
    from benchmarks.kernels.contenders import LINEAR, NotRunError
    from benchmarks.kernels.problem import find_shape, make_problem

    shape = find_shape("tiny")
    with pytest.raises(NotRunError, match="float32 logits are not rounded"):
        LINEAR["ours, exact=False"](make_problem(shape, "cpu"))
    half = make_problem(replace(shape, dtype=torch.bfloat16), "cpu")
    exact, rounded = (LINEAR[name](half).item() for name in ("ours, fused loss", "ours, exact=False"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def test_pytorchs_own_linear_cross_entropy_agrees_with_plain_cross_entropy():
    from benchmarks.kernels.contenders import LINEAR
    from benchmarks.kernels.problem import find_shape, make_problem

    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    problem = make_problem(find_shape("tiny"), "cpu")
    expected = F.cross_entropy(problem.hidden @ problem.weight.t(), problem.labels)
    torch.testing.assert_close(LINEAR["torch linear_cross_entropy"](problem), expected)


def test_the_plot_shows_ratio_memory_and_growth(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.kernels.report import plot

    rows = [
        {"task": "linear", "shape": "s", "contender": name, "time_s": 1.0, "extra_bytes": 1 << 20}
        for name in ("naive", "ours, fused loss")
    ]
    one = {"sizes": [1, 2], "time_s": [1.0, 2.0], "extra_bytes": [5, 5], "time_slope": 1.0, "memory_slope": 0.0}
    assert plot(rows, [one | {"axis": "tokens", "contender": "ours"}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_measurement_that_dies_or_fails_is_listed_with_its_reason(monkeypatch):
    """In a process of its own: neither its end nor its error is that of the run."""
    from benchmarks.kernels import processes

    def failing(task, *rest):
        if task == "dies":
            os._exit(9)
        raise ZeroDivisionError("no tokens")

    monkeypatch.setattr(processes, "measured", failing)
    assert processes.child("dies", "tiny", "naive", "cpu", 1) == {"not_run": "failed: exit status 9"}
    assert processes.child("raises", "tiny", "naive", "cpu", 1) == {"not_run": "failed: ZeroDivisionError: no tokens"}
