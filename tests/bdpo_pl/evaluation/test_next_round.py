"""Failures as preference rows: what `fit` makes of them before and after they are filled in."""

import json
from dataclasses import replace

import pytest
from makers import preference_rows, write_jsonl

from bdpo_pl import fit
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.measures.rates import Rate, SuiteResult
from bdpo_pl.evaluation.next_round import Failure, Weakness, is_untouched, weakest, write_rows
from bdpo_pl.evaluation.runner import check_refine
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import WARNING
from bdpo_pl.reviewing.rows import reviewing
from bdpo_pl.statistics import Interval


def failures(n=8):
    prompts = [
        EvaluationPrompt(f"Framed: {row['prompt']}", row["prompt"], "fraud", f"file, line {i}", attack="fiction")
        for i, row in enumerate(preference_rows(n), start=1)
    ]
    suite = Suite("mine", "harmful", prompts)
    return [Failure("after", suite, prompt, f"sure , zebra {i} ü .") for i, prompt in enumerate(prompts)]


def result(suite, overall, **categories):
    def rate(name, value, count):
        return Rate(name, Interval(value, 0.0, 1.0, count, count))

    return SuiteResult(
        suite,
        "harmful",
        "not refused",
        "file",
        rate(suite, overall, 10),
        [rate(n, *v) for n, v in categories.items()],
        None,
        0,
        1.0,
        [],
    )


def test_rows_say_what_went_wrong_and_where(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    assert write_rows(failures(2), path) == path
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first.pop("digest") == second.pop("digest")
    assert first == {
        "prompt": f"Framed: {preference_rows(1)[0]['prompt']}",
        "chosen": None,
        "rejected": "sure , zebra 0 ü .",
        "category": "fraud",
        "kind": "harmful",
        "suite": "mine",
        "attack": "fiction",
        "model": "after",
        "place": "file, line 1",
        "warning": WARNING,
    }
    assert second["rejected"] == "sure , zebra 1 ü ."


def test_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("work of mine")
    with pytest.raises(InputError, match=r"rows\.jsonl exists already, and may hold chosen responses that you wrote"):
        check_refine(str(path))
    # Work that came after the start costs no answers, and is kept.
    assert write_rows(failures(1), path) == tmp_path / "rows-2.jsonl"
    assert path.read_text() == "work of mine"
    assert is_untouched(tmp_path / "rows-2.jsonl")


@pytest.mark.parametrize(
    "edit",
    [
        lambda rows: rows[1].update(chosen="no"),
        lambda rows: rows[1].update(prompt="another ?"),
        lambda rows: rows[1].update(rejected="another"),
        lambda rows: rows[1].update(note="mine"),
        lambda rows: rows[1].pop("category"),
        lambda rows: rows.pop(),
        lambda rows: rows.append({"prompt": "mine", "chosen": None, "rejected": "mine", "warning": WARNING}),
        lambda rows: [row.pop("digest") for row in rows],
    ],
)
def test_any_edit_is_kept(tmp_path, edit):
    path = tmp_path / "rows.jsonl"
    write_rows(failures(3), path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert is_untouched(write_jsonl(path, rows))
    edit(rows)
    assert not is_untouched(write_jsonl(path, rows))


def test_rows_under_review_are_kept(tmp_path):
    path = write_rows(failures(1), tmp_path / "rows.jsonl")
    with reviewing(path) as file:
        assert write_rows(failures(2), path) == tmp_path / "rows-2.jsonl"
        file.answer(0, "no")
        # Back to what it was.
        file.answer(0, None)
    assert is_untouched(path)


def test_untouched_file_is_replaced_whatever_an_answer_holds_and_by_a_whole_one(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    odd = [replace(one, response="sure\u2028 , \x85 zebra \r\n") for one in failures(3)]
    assert write_rows(odd, path) == path
    assert is_untouched(path)
    assert write_rows(odd[:2], path) == path
    before = path.read_bytes()
    assert before.count(b"\n") == 2

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_rows(odd, path)
    assert path.read_bytes() == before
    path.write_text("")
    assert is_untouched(path)


def test_file_that_cannot_be_written_is_found_out_first(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "rows.jsonl"
    with pytest.raises(InputError, match=r"refine: .*rows\.jsonl cannot be written"):
        check_refine(str(path))
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be written .*for refine"):
        write_rows(failures(1), path)
    assert check_refine(None) is None
    assert check_refine(str(tmp_path / "new" / "rows.jsonl")) == tmp_path / "new" / "rows.jsonl"


def test_fit_refuses_rows_until_they_are_filled_in_and_then_trains_on_them(tmp_path, model_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    write_rows(failures(), path)
    command = [
        f"--model.policy={model_dir}", f"--data.train={path}", "--data.held_out_fraction=0.25", "--export=false",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def refused(line):
        with pytest.raises(SystemExit) as stopped:
            fit.main(command)
        assert stopped.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"rows.jsonl, line {line}" in said
        assert "chosen" in said

    refused(1)
    for row in rows[:3]:
        row["chosen"] = "i cannot help with that ."
    write_jsonl(path, rows)
    refused(4)
    for row in rows:
        row["chosen"] = "i cannot help with that ."
    write_jsonl(path, rows)
    fit.main(command)
    printed = capsys.readouterr().out
    assert "6 pairs" in printed
    assert "1 optimiser step" in printed


def test_weakest_categories_by_hand():
    results = [
        # Above the suite's 0.5: a, b and e. By the lower ends of the intervals: a 0.60, c 0.25, b 0.23, e 0.21, d 0.12.
        result("one", 0.5, e=(1.0, 1), a=(0.9, 10), b=(0.6, 5), same=(0.5, 50), below=(0.4, 50)),
        result("two", 0.2, c=(0.6, 7), d=(0.3, 9)),
        result("three", 1.0, all=(1.0, 10)),
    ]
    expected = [Weakness("one", "a", 0.9, 10), Weakness("two", "c", 0.6, 7), Weakness("one", "b", 0.6, 5)]
    assert weakest(results) == expected
    assert weakest(results, 9) == [
        *expected,
        Weakness("one", "e", 1.0, 1),
        Weakness("two", "d", 0.3, 9),
    ]
    assert weakest([]) == []
