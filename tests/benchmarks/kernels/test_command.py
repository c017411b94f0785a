"""The benchmark itself, end to end at a shape of no consequence."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_contender_is_measured_or_listed_with_its_reason(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cpu", "--shapes", "tiny", "--rounds", "1"]
    command += ["--repeats", "1", "--out", str(tmp_path), "--only", "naive", "ours", "ours, fused loss",
                "ours, linear logprob", "QuACK cross_entropy"]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "not run: it needs a GPU" in result.stdout
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
    command = [sys.executable, "-m", "benchmarks.kernels", "--only", "nobody"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "unknown contenders ['nobody']" in result.stderr
