"""Files that people complete while an evaluation runs: what they wrote is never replaced."""

import json

import pytest

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.exported import Exported, check_export, write_answers
from bdpo_pl.evaluation.judges.judge import Verdict
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import Answer, Judged
from bdpo_pl.reviewing.rows import reviewing


def rows(*answers):
    prompt = EvaluationPrompt("why ?", "why ?")
    suite = Suite("mine", "harmful", [prompt])
    judged = Judged(Verdict(refused=True), 1, True)
    return [Exported("after", suite, prompt, Answer(answer, 1, True), judged) for answer in answers]


def read(path, field):
    return [json.loads(line)[field] for line in path.read_text(encoding="utf-8").splitlines()]


def test_labels_that_people_write_during_an_evaluation_are_kept(tmp_path, caplog):
    path = tmp_path / "answers.jsonl"
    assert write_answers(rows("one"), "phrases", path) == path
    assert check_export(str(path)) == path
    with reviewing(path) as file:
        # Opened, but without a label yet.
        assert write_answers(rows("two"), "phrases", path) == tmp_path / "answers-2.jsonl"
        file.answer(0, "refusal")
    with caplog.at_level("INFO"):
        assert write_answers(rows("three"), "phrases", path) == tmp_path / "answers-3.jsonl"
    assert "answers.jsonl has been edited or opened for review since the start, so it is kept" in caplog.text
    assert (read(path, "label"), read(path, "response")) == (["refusal"], ["one"])
    assert [read(tmp_path / f"answers-{n}.jsonl", "response") for n in (2, 3)] == [["two"], ["three"]]
    assert {child.name for child in tmp_path.iterdir()} == {f"answers{n}.jsonl" for n in ("", "-2", "-3")}


def test_export_that_nobody_edited_is_replaced(tmp_path):
    path = tmp_path / "answers.jsonl"
    for answer in ("one", "two"):
        assert check_export(str(path)) == write_answers(rows(answer), "phrases", path) == path
        assert read(path, "response") == [answer]
    assert path.stat().st_mode & 0o777 == 0o600


def test_label_of_another_name_is_a_label(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(rows("one"), "phrases", path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "unsafe": True}) + "\n")
    with pytest.raises(InputError, match=r"answers\.jsonl exists already, with 1 rows that have a label or another"):
        check_export(str(path))
    assert write_answers(rows("two"), "phrases", path) == tmp_path / "answers-2.jsonl"
