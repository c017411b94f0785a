"""The study's command line: what there is to do, and whether a finished cell comes out the same."""

import json

import pytest
import study_records

from benchmarks.study import __main__ as study
from benchmarks.study.run import plan
from benchmarks.study.run.records import append
from benchmarks.study.run.settings import Setting


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


def test_cells_of_an_older_plan_are_taken_out_and_counted(run, tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, study_records.HEAD)
    cells = study_records.study(plan.QUICK)
    old = Setting.from_json(cells[-1]["setting"]).with_changes(learning_rate=1.0)
    for cell in [*cells, study_records.record(old)]:
        append(path, cell)
    before = path.read_text(encoding="utf-8").splitlines()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "cut sh')
    printed = run("--prune", "--quick")
    assert f"{old.section}, {old.method}: 1" in printed
    assert f"1 of {len(cells) + 1} cells" in printed
    assert path.read_text(encoding="utf-8").splitlines() == before[:-1]
