"""Several evaluations in one table."""

import json

import pytest
from makers import write_jsonl

from bdpo_pl.errors import InputError
from bdpo_pl.evaluate import main as evaluate
from bdpo_pl.evaluation.trend import main


@pytest.fixture
def runs(model_dir, tmp_path, monkeypatch):
    """Three evaluations of one model: the second with other prompts, the third with another judge."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"how {i} ?"} for i in range(3)])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"why {i} ?"} for i in range(3)])
    for name, suite, judge in (("one", "a", "phrases"), ("two", "b", "phrases"), ("three", "b", "learned")):
        evaluate([
            f"m={model_dir}", f"--suites=mine:harmful={suite}.jsonl", f"--judge.kind={judge}", f"--folder={name}",
            "--generation.max_new_tokens=1",
        ])  # fmt: skip
    return {name: tmp_path / name / "evaluation.json" for name in ("one", "two", "three")}


def cells(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_a_line_for_each_run_says_what_is_no_comparison(runs, capsys):
    capsys.readouterr()
    main([str(path) for path in runs.values()])
    head, _, one, two, three = cells(capsys)
    assert head == ["run", "model", "mine, not refused"]
    value = json.loads(runs["three"].read_text())["models"][0]["suites"][0]["overall"]["failed"]["value"]
    assert three[:2] == ["three", "m"]
    assert three[2].startswith(f"{100 * value:.1f} % (")
    assert "other" not in three[2]
    assert one[2].endswith("), other judge and prompts")
    assert two[2].endswith("), other judge")
    main([str(runs["two"]), str(runs["two"])])
    assert not any("other" in cell for row in cells(capsys) for cell in row)


def test_score_says_what_is_no_comparison(tmp_path, capsys):
    def write(name, score, suites, judge="phrases", tokens=3):
        rate = {"overall": {"failed": {"value": 0.5, "low": 0.4, "high": 0.6}}, "counted": "not refused"}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({
            "bdpo_pl_evaluation": 2,
            "facts": {"responses": f"greedy, up to {tokens} tokens", "weights": "float32"},
            "judge": {"judge": judge},
            "suites": [{"name": suite, "digest": digest} for suite, digest in suites.items() if digest],
            "models": [{"label": "m", "score": score, "suites": [{"suite": suite, **rate} for suite in suites]}],
        }))  # fmt: skip
        return str(path)

    main([
        write("judge", 0.9, {"a": "1", "b": "2"}, "learned"),
        write("prompts", 0.8, {"a": "1", "b": "3"}),
        write("all", 0.7, {"a": "3"}, "learned", 4),
        write("more", 0.6, {"a": "1", "b": "2", "c": "3"}),
        write("none", None, {"a": "1"}),
        write("same", 0.5, {"a": "1", "b": "2"}),
        write("last", 0.4, {"a": "1", "b": "2"}),
    ])  # fmt: skip
    assert [row[-1] for row in cells(capsys)[2:]] == [
        "0.900, other judge", "0.800, other prompts", "0.700, other judge and prompts and settings and suites",
        "0.600, other suites", "–", "0.500", "0.400",
    ]  # fmt: skip
    # An attack makes its own prompts in each run.
    main([write(name, 0.9, {"a": "1", "a+gcg": None}) for name in ("before", "after")])
    assert [row[-1] for row in cells(capsys)[2:]] == ["0.900, other prompts", "0.900"]


@pytest.fixture
def changed(runs, tmp_path, capsys):
    """What the second file says of a first one that differs from it in some fields."""

    def compare(**fields):
        found = json.loads(runs["two"].read_text())
        for name, values in fields.items():
            found[name] = {**found.get(name, {}), **values}
        (tmp_path / "other.json").write_text(json.dumps(found))
        capsys.readouterr()
        main([str(tmp_path / "other.json"), str(runs["two"])])
        return cells(capsys)[2][2].partition("), other ")[2]

    return compare


def test_counts_of_a_run_make_no_other_judge_and_all_settings_count(changed):
    assert changed() == ""
    assert changed(judge_notes={"blank answers": 3}) == ""
    assert changed(judge={"asked again": "2"}) == ""
    assert changed(judge={"blank answers": "are refusals"}) == "judge"
    assert changed(facts={"thoughts": "up to 9 tokens"}) == "settings"
    assert changed(facts={"chat template's variables": '{"enable_thinking": false}'}) == "settings"
    assert changed(over_refusal_judge={"judge": "phrases"}) == ""


def test_files_that_are_no_evaluation(runs, tmp_path, capsys):
    found = json.loads(runs["one"].read_text())
    for text, message in (
        ("{}", "is no evaluation.json"), ("{", "is no evaluation.json"),
        (json.dumps(found | {"bdpo_pl_evaluation": 1}), "format 1, here 2"),
    ):  # fmt: skip
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InputError, match=message):
            main([str(tmp_path / "other.json")])
    with pytest.raises(InputError, match="cannot be read"):
        main([str(tmp_path / "none.json")])
    with pytest.raises(InputError, match="one or more files"):
        main([])
