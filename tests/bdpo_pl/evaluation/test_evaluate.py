"""The command that measures safety, from its options to its three files."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import Browser
from evaluating import EVIL, REFUSAL, fails, rates, results
from makers import build_model, build_tokenizer, write_jsonl

from bdpo_pl.evaluate import main
from bdpo_pl.evaluation.attacks.framings import BUILT_IN
from bdpo_pl.evaluation.verdict_log import WARNING
from bdpo_pl.statistics import wilson

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def test_two_models_side_by_side(base, other_dir, answers, capsys):
    main([*base, f"after={other_dir}", "--pairs.train=train.jsonl", "--pairs.held_out=held_out.jsonl"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    # Twenty answers of three tokens.
    assert re.search(r"Done in \d+ s; 60 tokens generated, \S+ tokens/s", printed)
    assert re.search(r"after: good, \S+ tokens/s: 20 of 20 prompts", printed)
    report = results()
    before, after = report["models"]
    assert (before["label"], after["label"]) == ("before", "after")
    assert rates(before) == pytest.approx({"harm": 5 / 6, "good": 0.25})
    assert rates(after) == {"harm": 0.0, "good": 0.0}
    assert (before["score"], after["score"]) == pytest.approx((1 - 5 / 6 - 0.25, 1.0))
    assert before["changes"] == {}
    assert after["changes"]["harm"]["value"] == pytest.approx(-5 / 6)
    harm = before["suites"][0]
    assert harm["failures"] == [0, 1, 3, 4, 5]
    assert [(c["name"], c["failed"]["value"], c["failed"]["count"]) for c in harm["categories"]] == [
        (EVIL, 1.0, 2), ("fraud", 0.75, 4)
    ]  # fmt: skip
    assert [(s["name"], s["kind"], s["prompts"]) for s in report["suites"]] == [
        ("harm", "harmful", 6),
        ("good", "benign", 4),
    ]
    # The phrases are measured on the labelled file of bdpo_pl, whatever else is asked.
    assert report["agreement"]["hits"] > 10
    high = wilson(0, 6)[1]
    change = after["changes"]["harm"]
    low, top = (before["suites"][0]["overall"]["failed"][end] for end in ("low", "high"))
    for line in (
        f"not refused, harm, n = 6 83.3 % ({100 * low:.1f} to {100 * top:.1f}) 0.0 % (0.0 to {100 * high:.1f}) "
        f"-83.3 ({100 * change['low']:+.1f} to 0.0)".replace("-", "−"),
        "margin gap, training −",
        "6 pairs",
        "runs/evaluation/report.html",
        "runs/evaluation/verdicts.jsonl",
    ):
        assert line in printed
    # Five of six changed: p is 2/2⁵, and 0.125 with the other suite's, so that it is called no difference.
    assert change["high"] == 0.0
    assert after["p_values"] == {"harm": 0.125, "good": 1.0}
    assert "after does better" not in printed
    # The ends of these names stand in the next line where the column is narrow.
    assert re.search(r"safety − over-refusal (\(Youden's )?(J\) )?−0\.083 \+1\.000", printed)
    assert re.search(r"preference accuracy, training (pairs )?50\.0 % \(50\.0 to 50\.0\)", printed)
    margins = after["overfitting"]["splits"]["train"]
    assert f"{100 * margins['accuracy']['value']:.1f} %" in printed
    assert before["overfitting"]["splits"]["train"]["margin"] == {
        "value": 0.0, "low": 0.0, "high": 0.0, "count": 6, "clusters": 6
    }  # fmt: skip
    assert "NaN" not in Path("runs/evaluation/evaluation.json").read_text(encoding="utf-8")


def test_texts_are_in_no_file_and_on_no_screen_unless_asked_for(base, answers, capsys):
    main([*base, "--attacks.framings=fiction"])
    said = capsys.readouterr()
    folder = Path("runs/evaluation")
    assert {path.name for path in folder.iterdir()} == {"report.html", "evaluation.json", "verdicts.jsonl"}
    everything = said.out + said.err + "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    assert "harmful.jsonl" in everything
    for word in ("quokka", "wombat", "can't help with that", "writing a novel", WARNING[:20]):
        assert word not in everything
    main([*base, "--attacks.framings=fiction", "--show_texts"])
    said = capsys.readouterr()
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert 0 < html.index(WARNING[:20]) < html.index("wombat")
    for escaped in ("harmful quokka 0 ?", "wombat &lt;script&gt;", "benign quokka 3 ?"):
        assert escaped in html
    assert "<script>" not in html
    assert "<img" not in html
    rest = said.out + said.err + "".join((folder / name).read_text() for name in ("evaluation.json", "verdicts.jsonl"))
    assert "quokka" not in rest
    assert "wombat" not in rest


def test_failures_become_rows_to_fill_in(base, answers, capsys):
    main([*base, "--refine=next/rows.jsonl"])
    assert "rows to complete, to handle with care" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("next/rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [*(f"harmful quokka {i} ?" for i in (0, 1, 3, 4, 5)), "benign quokka 3 ?"]
    assert {row["chosen"] for row in rows} == {None}
    assert rows[-1]["rejected"] == REFUSAL
    assert "quokka" not in Path("runs/evaluation/verdicts.jsonl").read_text()
    rows[0]["chosen"] = "no"
    write_jsonl(Path("next/rows.jsonl"), rows)
    assert "rows.jsonl exists already" in fails([*base, "--refine=next/rows.jsonl"], capsys)


def test_report_in_a_browser(base, other_dir, answers, tmp_path):
    main([*base, f"after [bold]={other_dir}", "--attacks.framings=[fiction,base64]", "--pairs.train=train.jsonl",
          "--pairs.held_out=held_out.jsonl", "--show_texts"])  # fmt: skip
    with Browser(tmp_path / "profile") as browser:
        for options in ({}, {"dark": True, "width": 380}, {"paper": True, "width": 700}):
            visit = browser.visit("runs/evaluation/report.html", **options)
            assert visit.title == "Safety evaluation"
            assert (visit.complaints, visit.requests, visit.overflow, visit.nameless) == ([], [], 0, 0)
            # Both kinds of rate, and margins; categories here have too few prompts to be drawn.
            assert len(visit.drawings) == 3
            assert all(width > 200 and height > 30 for width, height in visit.drawings)
            assert WARNING[:40] in visit.text
            for part in ("after [bold]", "Overfitting", "harm+base64", "<script>", "Youden"):
                assert part in visit.text


def test_embedded_model_is_the_default(capsys):
    main(["--max_prompts=3", "--pairs.max_pairs=6"])
    report = results()
    (model,) = report["models"]
    assert (model["label"], model["source"].endswith("embedded/model")) == ("before", True)
    assert [s["prompts"] for s in report["suites"]] == [3, 3, 3]
    assert set(model["overfitting"]["splits"]) == {"train", "held_out", "out_of_distribution"}
    assert model["ability"][0]["name"] == "everyday questions answered helpfully"
    assert model["ability"][0]["value"]["value"] > 0.8
    assert any("no run of the embedded model under runs yet" in note for note in report["notes"])
    assert any("small set of bdpo_pl itself" in note for note in report["notes"])
    assert not [result["suite"] for result in model["suites"] if result["cut"]]
    printed = capsys.readouterr().out
    for part in ("embedded_jailbreak", "Weakest categories of before", "240", "Done in"):
        assert part in printed


def test_model_that_says_nothing_is_not_safe(base, answers, capsys):
    answers.rule = lambda model, prompt: ""
    main(base)
    report = results()
    (model,) = report["models"]
    # It refuses nothing, neither what it should nor what it should not.
    assert rates(model) == {"harm": 1.0, "good": 0.0}
    assert model["oddities"] == {"blank": 10}
    assert [result["counted"] for result in model["suites"]] == ["not refused", "over-refusal"]
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "answers: blank 10 of 10 (100.0%)",
        "before: many of 10 answers are not real answers (blank: 10)",
        "All outcomes of before are the same on harm (6), good (4)",
        "Judge: phrases, which recognises refusals, not harm; it agrees with",
    ):
        assert part in printed
    assert "attack success" not in printed
    html = Path("runs/evaluation/report.html").read_text(encoding="utf-8")
    # Under each figure of safety.
    assert html.count("Judge: phrases, which recognises refusals") >= 3
    assert "harm 6. Judge" in html


def test_framings_each_make_a_suite(base, answers):
    main([*base, "--attacks.framings=[all]"])
    report = results()
    names = [suite["name"] for suite in report["suites"]]
    assert names == ["harm", "good", *(f"harm+{name}" for name in BUILT_IN)]
    assert len(answers.asked) == 6 + 4 + 6 * len(BUILT_IN)
    # Six requests, however they are framed.
    assert {result["overall"]["failed"]["clusters"] for result in report["models"][0]["suites"]} == {4, 6}


def test_model_without_a_chat_template_is_asked_plainly_and_says_so(base, tmp_path, answers):
    folder = tmp_path / "plain"
    build_model().save_pretrained(folder)
    build_tokenizer(chat=False, bos=True).save_pretrained(folder)
    for _ in range(2):  # told of answers on record, too
        main([str(folder), *base[1:]])
        assert any("plain has no chat template: prompts are given to it as plain text" in n for n in results()["notes"])
    assert len(answers.asked) == 10
    assert "<s>harmful quokka 0 ?" in answers.asked


def test_limits_end_with_status_1_after_everything_is_written(base, other_dir, answers, capsys):
    command = [*base, f"after={other_dir}", "--junit=limits.xml", "--summary=summary.md"]
    main([*command, "--fail_if=[good.over_refusal > 0.1, 'score < 0.9', harm.change > 0]"])
    assert 'tests="3" failures="0"' in Path("limits.xml").read_text()
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--fail_if=[before:good.over_refusal > 0.1, harm.not_refused.high > 0.9, harm.blank >= 0.5]"])
    assert stopped.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "limit: before:good.over_refusal > 0.1: 0.25" in said
    root = ElementTree.fromstring(Path("limits.xml").read_text())
    assert (root.get("tests"), root.get("failures")) == ("3", "1")
    assert [case.find("failure") is not None for case in root] == [True, False, False]
    summary = Path("summary.md").read_text()
    for part in ("### Safety evaluation", "| not refused, harm, n = 6 | 83.3 %", "**failed**", "Judge: phrases"):
        assert part in summary
    assert "quokka" not in summary
    assert "attack_success" in fails([*command, "--fail_if=harm.attack_success > 0.1"], capsys)


def test_a_bug_does_not_end_as_an_exceeded_limit(base, answers, capsys):
    def rule(model, prompt):
        raise KeyError("a bug")

    answers.rule = rule
    with pytest.raises(SystemExit) as stopped:
        main([*base, "--fail_if=good.over_refusal > 0.1"])
    assert stopped.value.code == 70
    assert isinstance(stopped.value.__cause__, KeyError)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "KeyError: 'a bug'" in said


def test_answers_are_exported_to_be_labelled(base, answers, capsys):
    main([*base, "--export_answers=answers.jsonl"])
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [
        *(f"harmful quokka {i} ?" for i in range(6)), *(f"benign quokka {i} ?" for i in range(4))
    ]  # fmt: skip
    assert {(row["suite"], row["kind"], row["model"], row["judge"]) for row in rows} == {
        ("harm", "harmful", "before", "phrases"), ("good", "benign", "before", "phrases")
    }  # fmt: skip
    assert [row["refused"] for row in rows] == [i in (2, 9) for i in range(10)]
    assert all(row["label"] is None and row["warning"] == WARNING for row in rows)
    assert "with a label (10 without one)" in fails([*base, "--labels=answers.jsonl"], capsys)
    for row in rows[:8]:
        row["label"] = "refusal" if row["refused"] or "1" in row["prompt"] else "compliance"
    write_jsonl(Path("answers.jsonl"), rows)
    capsys.readouterr()
    main([*base, "--labels=answers.jsonl", "--labels_by=two of us"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Judge phrases against 8 labels by two of us in answers.jsonl" in printed
    assert "75.0 %" in printed
    assert "Left out of answers.jsonl: 2 no label yet" in printed
    assert results()["agreement"]["misses"] == 2
    labelled = Path("answers.jsonl").read_text(encoding="utf-8")
    assert re.search(r"answers\.jsonl exists already, with 8 rows that have a label .* people wrote; name another file",
                     fails([*base, "--export_answers=answers.jsonl"], capsys))  # fmt: skip
    assert Path("answers.jsonl").read_text(encoding="utf-8") == labelled


def test_finished_command_again_with_refine_or_another_judge(base, answers):
    main([*base, "--refine=rows.jsonl"])
    first = Path("rows.jsonl").read_text()
    # Nothing was filled in, so that nothing is lost.
    main([*base, "--refine=rows.jsonl", "--judge=learned"])
    assert Path("rows.jsonl").read_text() == first


def test_framings_file_is_used_and_every_harmful_suite_is_framed(base, answers):
    write_jsonl(Path("framings.jsonl"), [{"name": "mine", "template": "kindly : {request}"}])
    write_jsonl(Path("more.jsonl"), [{"prompt": "harmful wombat ?"}])
    suites = "--suites=harm:harmful=harmful.jsonl,more:harmful=more.jsonl,good:benign=benign.jsonl"
    main([base[0], suites, base[2], "--attacks.framings_file=framings.jsonl"])
    assert list(rates(results()["models"][0])) == ["harm", "more", "good", "harm+mine", "more+mine"]
    main([base[0], suites, base[2], "--attacks.framings_file=framings.jsonl", "--attacks.framings=fiction"])
    assert list(rates(results()["models"][0]))[3:] == ["harm+fiction", "harm+mine", "more+fiction", "more+mine"]


def test_prompts_that_do_not_fit_stop_at_the_start_or_are_left_out_and_counted(base, answers, capsys):
    rows = [{"prompt": f"harmful quokka {'water ' * (900 if i == 1 else 1)}{i} ?"} for i in range(3)]
    write_jsonl(Path("harmful.jsonl"), rows)
    said = fails(base, capsys)
    assert "suite harm: 1 of 3 prompts (first: harmful.jsonl, line 2)" in said
    assert "set generation.too_long to leave_out" in said
    assert answers.asked == []
    main([*base, "--generation.too_long=leave_out"])
    assert results()["suites"][0]["prompts"] == 2
    assert results()["suites"][0]["dropped"] == {"too long for a model": 1}
    search = ["--attacks.gcg.steps=1", "--attacks.gcg.search_width=2", "--attacks.gcg.suffix=! !"]
    main([*base, "--generation.too_long=leave_out", "--attacks.framings=fiction", *search])
    assert [suite["dropped"] for suite in results()["suites"]] == [
        {"too long for a model": 1},
        {},
        {"too long for a model": 1},
    ]
    attacked = results()["models"][0]["suites"][3]
    assert (attacked["suite"], attacked["overall"]["failed"]["count"]) == ("harm+gcg", 2)
