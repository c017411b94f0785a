"""Options of the command that measures safety: as users write them, in files, and what is refused."""

import re
from pathlib import Path

import pytest
import yaml
from evaluating import fails, rates, results
from makers import write_jsonl

from bdpo_pl.evaluate import main
from bdpo_pl.evaluation.options import parse
from bdpo_pl.evaluation.subjects import Subject
from bdpo_pl.files import RunFolder

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--suites=nosuch"], "there is no suite 'nosuch'; known are embedded_harmful"),
        (["--suites=mine:harmful=train.csv"], "train.csv"),
        (["--suites=mine:harmful=labels.jsonl"], "its columns 'question' are those of no layout known"),
        (["--suites=[{name: mine, file: harmful.jsonl, kind: harmful, columns: {prompt: q}}]"], "no column 'q'"),
        (
            ["--suites=mine=harmful.jsonl"],
            "does not determine the kind of its prompts; write mine:harmful=harmful.jsonl",
        ),
        (["--max_prompts=0"], "max_prompts must be at least 1"),
        (["--folder=harmful.jsonl/x"], "set folder to a folder that can"),
        (["--refine=harmful.jsonl"], "harmful.jsonl exists already"),
        *(
            ([f"--{name}=harmful.jsonl/x"], f"{name}: harmful.jsonl/x cannot be written")
            for name in ("refine", "export_answers", "summary")
        ),
        (["--junit=harmful.jsonl/x", "--fail_if=score < 0"], "junit: harmful.jsonl/x cannot be written"),
        (["--junit=limits.xml"], "junit is for limits, and there is none: give fail_if"),
        (["--labels_by=two of us"], "labels_by is for a file of labels of your own, and there is none: give labels"),
        (["--labels_columns={response: r}", "--labels=embedded"], "labels_columns is for a file of labels of your own"),
        (["--server.timeout=5"], "server is for models behind a server, and none is named"),
        (["--ability.num_fewshot=3"], "ability.num_fewshot is for tasks of lm_eval"),
        (
            ["--attacks.attacker.url=http://h/v1", "--attacks.attacker.model=m", "--attacks.framings=fiction"],
            "attacks.attacker is for refinement and tree, and none is chosen",
        ),
        (["--attacks.max_prompts=9", "--attacks.framings=fiction"], "attacks.max_prompts is for gcg, genetic,"),
        (["--attacks.folder=x", "--attacks.prefill"], "attacks.folder is for gcg, genetic,"),
        (["--attacks.suite=harm"], "attacks.suite is for attacks on harmful requests, and none is chosen"),
        (["--summary=."], "summary: . is a folder; name a file"),
        (["before=/nowhere"], "models: before names several; give each a label"),
        (["--device=nosuch"], "device 'nosuch' is not available here"),
        (["--dtype=int8"], "dtype must be auto, float32, bfloat16 or float16, not 'int8'"),
        (["--generation.max_new_tokens=0"], "generation.max_new_tokens must be at least 1"),
        (["nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["--judge.kind=llama_guard"], "judge llama_guard needs a model"),
        (["--judge.kind=nosuch"], "nosuch"),
        (["--judge={"], "judge"),
        (["--judge=phrases", "--judge.model=x"], "model"),
        (["--fail_if=good.over_refusal"], "is not a limit; write SUITE.MEASURE > NUMBER"),
        (["--fail_if=goood.over_refusal > 0.1"], "there is no suite 'goood'; choose harm, good"),
        (["http://127.0.0.1:1/v1"], "does not name one of the server's models"),
        (["http://127.0.0.1:1/v1#m", "--attacks.gcg"], "attacks.gcg need a model"),
        (["--labels=nowhere.jsonl"], "nowhere.jsonl"),
        (["--attacks.framings=nosuch"], "nosuch"),
        (["--attacks.refinement"], "attacks.refinement needs a model that attacks"),
        (["--attacks.suite=good", "--attacks.framings=all"], "no harmful suite good among harm, good"),
        (["--attacks.max_prompts=0"], "attacks.max_prompts must be at least 1"),
        (["--attacks.tree"], "attacks.tree needs a model that attacks"),
        (["http://127.0.0.1:1/v1#m", "--attacks.genetic"], "attacks.genetic need a model"),
        (["--budget.requests=5", "--attacks.framings=fiction"], "budget limits attacks that search"),
        (["--ability.limit=0"], "ability.limit must be at least 1"),
        (["--pairs.max_pairs=-1"], "pairs.max_pairs must be at least 0"),
        (["--nosuch=1"], "--nosuch=1"),
        (["--keep_answers=perhaps"], "keep_answers"),
        (["--folder"], "--folder"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_faults_are_told_before_any_model_is_loaded(base, capsys, tmp_path, monkeypatch, options, fault):
    write_jsonl(tmp_path / "labels.jsonl", [{"question": "why ?"}])
    monkeypatch.setattr(Subject, "load", lambda *_: pytest.fail("a model was loaded"))
    assert fault in fails([*base, *options], capsys)
    assert not list(Path("runs").glob("*/evaluation.json"))


def test_folder_of_another_evaluation_is_refused(base, capsys):
    with RunFolder(Path("runs/evaluation"), "folder"):
        said = fails(base, capsys)
    assert "another run is writing the folder" in said
    assert "of its own with folder" in said


def test_model_that_is_not_there(base, capsys):
    assert "no model folder at '/nowhere/at/all'" in fails(["/nowhere/at/all", *base[1:]], capsys)


def test_damaged_record_is_told(base, capsys, answers):
    main(base)
    with open("runs/evaluation/verdicts.jsonl", "a", encoding="utf-8") as file:
        file.write("nonsense\n")
    assert "verdicts.jsonl, line 12: not a record" in fails(base, capsys)


def test_file_names_models_and_suites_and_the_command_line_goes_before_it(base, model_dir, answers, capsys):
    config = {
        "models": [f"before={model_dir}"],
        "suites": ["good:benign=benign.jsonl", {"name": "harm", "file": "harmful.jsonl", "kind": "harmful"}],
        "attacks": {"framings": ["fiction"]},
        "generation": {"max_new_tokens": 3},
    }
    Path("job.yaml").write_text(yaml.safe_dump(config))
    main(["--config=job.yaml"])
    assert results()["models"][0]["label"] == "before"
    assert list(rates(results()["models"][0])) == ["good", "harm", "harm+fiction"]
    main([f"mine={model_dir}", "--config", "job.yaml", "--max_prompts", "2"])
    assert results()["models"][0]["label"] == "mine"
    assert [suite["prompts"] for suite in results()["suites"]] == [2, 2, 2]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["--config=job.yaml", "--folder=again", "--print_config"])
    assert stopped.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    main(["--config=printed.yaml"])
    assert list(rates(results("again")["models"][0])) == ["good", "harm", "harm+fiction"]
    capsys.readouterr()
    main(["--config=printed.yaml", "--suites=good:benign=benign.jsonl", "--attacks.framings=[]", "--max_prompts=2"])
    assert "fiction" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "models", "expected"),
    [
        (["a", "--max_prompts", "3", "b=c"], ["a", "b=c"], {"max_prompts": 3}),
        (["--show_texts", "a", "--keep_answers"], ["a"], {"show_texts": True, "keep_answers": True}),
        (["--show_texts=false", "--keep_answers", "false", "a"], ["a"], {"show_texts": False, "keep_answers": False}),
        (["--suites", "x"], [], {"suites": ["x"]}),
        (["--suites=x,y:benign=f.csv"], [], {"suites": ["x", "y:benign=f.csv"]}),
        (["--suites=[x, 'y=a, b.csv']"], [], {"suites": ["x", "y=a, b.csv"]}),
        (["--suites+=x", "--suites+", "y"], [], {"suites": ["x", "y"]}),
        (["--suites=null"], [], {"suites": None}),
        (["--attacks.framings", "all"], [], {"attacks.framings": ["all"]}),
        (["--attacks.framings=fiction,base64"], [], {"attacks.framings": ["fiction", "base64"]}),
        (["--attacks.gcg", "a"], ["a"], {"attacks.gcg.steps": 250}),
        (["--attacks.gcg=true"], [], {"attacks.gcg.steps": 250}),
        (["--attacks.gcg", "{steps: 2}"], [], {"attacks.gcg.steps": 2}),
        (["--attacks.gcg.steps", "2"], [], {"attacks.gcg.steps": 2, "attacks.gcg.topk": 256}),
        (["--attacks.gcg=false"], [], {"attacks.gcg": None}),
        (["--ability.lm_eval=gsm8k,mmlu"], [], {"ability.lm_eval": ["gsm8k", "mmlu"]}),
        (["--judge.threshold=0.25", "--judge.kind", "learned"], [], {"judge.name": "learned"}),
        (["--fail_if=a.over_refusal > 0.1"], [], {"fail_if": ["a.over_refusal > 0.1"]}),
        (["--pairs.load.bad_rows=drop"], [], {"pairs.load.bad_rows": "drop"}),
        (["--attacks.folder=x", "--attacks.gcg"], [], {"attacks.folder": "x"}),
        (["--attacks.max_prompts=9", "--attacks.genetic"], [], {"attacks.max_prompts": 9}),
        (
            ["--attacks.attacker.url=http://h/v1", "--attacks.attacker.model", "m", "--attacks.tree"],
            [],
            {"attacks.tree.depth": 4, "attacks.attacker.model": "m"},
        ),
        (
            ["--attacks.refinement", "--attacks.attacker.url=http://h/v1", "--attacks.attacker.model", "m"],
            [],
            {"attacks.refinement.streams": 3, "attacks.attacker.model": "m"},
        ),
    ],
)
def test_options_as_users_write_them(given, models, expected):
    named, options = parse(given)
    assert named == models
    for name, value in expected.items():
        found = options
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value


@pytest.mark.parametrize("name", ["gcg", "genetic", "refinement", "tree"])
def test_an_attack_in_a_file_may_be_true_for_all_its_defaults(name):
    attacker = {"url": "http://h/v1", "model": "m"} if name in ("refinement", "tree") else None
    Path("job.yaml").write_text(yaml.safe_dump({"attacks": {name: True, "attacker": attacker}}))
    found = getattr(parse(["--config=job.yaml"])[1].attacks, name)
    assert found == type(found)()


def test_help_is_readable_and_every_switch_and_list_has_its_short_form(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help_all"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m bdpo_pl.evaluate [MODEL ...] [--option VALUE ...]\n")
    for option in (
        "--suites",
        "--judge",
        "--attacks.gcg",
        "--pairs.train",
        "--config",
        "--list_suites",
        "LABEL=MODEL",
    ):
        assert option in printed
    for name in re.findall(r"^  (--\S+) \{true,false\}", printed, re.MULTILINE):
        parse([name, "a"])
    for name in ("--suites", "--attacks.framings", "--ability.lm_eval"):
        assert name in printed
        parse([name, "one,two"])
    with pytest.raises(SystemExit):
        main(["--attacks.gcg.help"])
    assert "--attacks.gcg.steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("judge", "shown"),
    [
        ("shieldgemma", ("--judge.policies", "--judge.max_new_tokens")),
        ("classifier", ("--judge.refused_labels", "--judge.unsafe_labels")),
        ("phrases", ("it has no options",)),
        ("bdpo_pl.evaluation.judges.learned.refusal_model.LearnedJudge", ("--judge.threshold",)),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_options_of_a_judge_are_listed(judge, shown, joined, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([f"--judge.help={judge}"] if joined else ["--judge.help", judge])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in shown)


def test_suites_are_listed(capsys):
    main(["--list_suites"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "embedded_benign benign",
        "StrongREJECT (arXiv:2402.10260)",
        "walledai/StrongREJECT (gated)",
        "xstest_benign",
    ):
        assert part in printed
    assert not Path("runs").exists()


OWN = """
from dataclasses import replace

from bdpo_pl.evaluation.attacks.attack import Attack, Attempted
from bdpo_pl.evaluation.judges.judge import Judge, Verdict


class Numbers(Judge):
    '''Takes an answer to an even question for a refusal.'''

    name = "numbers"

    def __init__(self, odd: bool = False):
        self.rest = int(odd)

    def judge(self, exchanges):
        return [Verdict(refused=int(e.prompt.split()[2]) % 2 == self.rest) for e in exchanges]

    def facts(self):
        return {"rest": str(self.rest)}


class Politely(Attack):
    '''Says please.'''

    name = "politely"

    def __init__(self, words: str):
        self.words = words

    def run(self, prompts, target, step):
        for prompt in prompts:
            step()
        answers = target.respond([prompt.text for prompt in prompts])
        made = [replace(prompt, text=f"{self.words} {prompt.text}", attack=self.name) for prompt in prompts]
        return Attempted(made, f"{len(answers)} answers of {target.name}")
"""


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere" / "ownparts"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder.parent))


def test_judge_and_attack_of_ones_own_from_a_file(base, answers, own_package, capsys):
    config = {
        "judge": {"class_path": "ownparts.Numbers", "init_args": {"odd": True}},
        "attacks": {"more": [{"class_path": "ownparts.Politely", "init_args": {"words": "please"}}], "max_prompts": 2},
    }
    Path("own.yaml").write_text(yaml.safe_dump(config))
    main([*base, "--config=own.yaml"])
    report = results()
    (model,) = report["models"]
    assert report["judge"] == {"judge": "numbers", "rest": "1"}
    # Of two prompts, 0 and 3, the second is refused.
    assert rates(model) == {"harm": 0.5, "good": 0.5, "harm+politely": 0.5}
    assert model["attacks"] == {"politely": "2 answers of before"}
    assert sum("please harmful" in prompt for prompt in answers.asked) == 2
    assert "Judge: numbers, which recognises refusals, not harm" in " ".join(capsys.readouterr().out.split())
    main([*base, "--config=own.yaml", "--judge=ownparts.Numbers", "--judge.odd=false"])
    assert results()["judge"]["rest"] == "0"


@pytest.mark.parametrize(
    "judge",
    ["learned", {"kind": "learned", "threshold": 0.5}, {"class_path": "learned", "init_args": {"threshold": 0.5}}],
)
def test_judge_by_short_name_in_a_file(base, answers, judge):
    Path("job.yaml").write_text(yaml.safe_dump({"judge": judge}))
    main([*base, "--config=job.yaml"])
    assert results()["judge"]["judge"] == "learned"
    assert rates(results()["models"][0]) == pytest.approx({"harm": 5 / 6, "good": 0.25})


def test_judge_by_short_name_on_the_command_line(base, answers):
    main([*base, "--judge.threshold=0.6", "--judge", "learned"])
    assert results()["judge"]["threshold"] == "0.6"


def test_folders_of_outputs_are_made(base, answers, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    main([*base, "--junit=~/ci/limits.xml", "--summary=ci/new/summary.md", "--export_answers=out/answers.jsonl",
          "--fail_if=score < -1"])  # fmt: skip
    assert all(Path(name).is_file() for name in ("ci/limits.xml", "ci/new/summary.md", "out/answers.jsonl"))
