"""The study's command line: what there is to do, and whether a finished cell comes out the same."""

import json

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import plan
from benchmarks.study.runner import append


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(study, "make_reference", lambda *arguments: None)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["study", "--out", str(tmp_path / "records.jsonl"), *arguments])
        study.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def record(tmp_path):
    setting = plan.tuning(plan.QUICK)[0]
    line = {"key": setting.key, "setting": json.loads(json.dumps(vars(setting))), "metrics": {"ability": {"all": 0.5}}}
    append(tmp_path / "records.jsonl", line)
    return line


def test_plan_counts_cells_and_those_done(run, record):
    printed = run("--plan", "--quick")
    rows = {cells[0]: cells[1:] for line in printed.splitlines() if (cells := line.replace("│", " ").split())}
    tuning = len(plan.tuning(plan.QUICK))
    assert rows["tuning"] == [str(tuning), "1"]
    total, done = rows["all"]
    assert int(total) > tuning
    assert done == "1"


def test_a_cell_run_again_is_compared(run, record, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "quiet_cell", lambda setting, folder: asked.append(setting) or dict(record, seconds=9))
    assert "the same to the last digit" in run("--cell", record["key"])
    assert [setting.key for setting in asked] == [record["key"]]
    monkeypatch.setattr(study, "quiet_cell", lambda setting, folder: record | {"metrics": {"ability": {"all": 0.6}}})
    with pytest.raises(SystemExit) as stopped:
        run("--cell", record["key"])
    assert stopped.value.code == 1


def test_a_cell_that_is_not_there_is_named(run, record):
    with pytest.raises(SystemExit, match="holds no cell abc"):
        run("--cell", "abc")
