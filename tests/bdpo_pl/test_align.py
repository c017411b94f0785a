"""Diagnosis, training and evaluation in one command."""

import html
import json
import re

import pytest
from makers import write_jsonl
from transformers import AutoModelForCausalLM

from bdpo_pl import align, embedded, fit


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))


def test_options_find_their_command():
    given = ["m", "--data", "p.jsonl", "--beta=0.2", "--suites", "a=b.csv", "--evaluate.judge.kind", "guard", "--bf16"]
    plan = align.parse(given)
    assert (plan.model, plan.data) == ("m", "p.jsonl")
    assert plan.training == ["--beta=0.2", "--bf16=true"]
    assert plan.evaluation == ["--suites=a=b.csv", "--judge.kind=guard"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["m"], "takes one model and --data"),
        (["m", "--data=d", "--ckpt_path=last"], "resumes by itself"),
        (["m", "--data=d", "--bta=0.1"], "did you mean --beta"),
        (["m", "--data=d", "--evaluate.max_promts=1"], "did you mean --max_prompts"),
    ],
)
def test_wrong_options_are_refused_before_anything_begins(given, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        align.main(given)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def job(tmp_path):
    """A job that is finished, with its files."""
    for name in ("pairs", "more", "held_out", "suite"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name, "chosen": "b", "rejected": "c"}])
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "d.jsonl", [{"prompt": "d"}])
    (tmp_path / "c.yaml").write_text("data: {held_out: {a: held_out.jsonl, b: {source: folder, limit: 5}}}\nseed: 1\n")
    given = ["m", "--data", "[{source: pairs.jsonl}, {source: more.jsonl, weight: 2}]", "--config=c.yaml"]
    plan = align.parse([*given, "--suites", "a:harmful=suite.jsonl,embedded_benign"])
    plan.folder.mkdir(parents=True)
    state = align._take_up(plan)
    state["done"] = ["diagnosis", "training", "evaluation"]
    align._write(plan.folder / "align.json", state)
    return plan


@pytest.mark.parametrize("name", ["pairs.jsonl", "more.jsonl", "held_out.jsonl", "folder/d.jsonl", "c.yaml"])
def test_results_of_other_pairs_are_not_taken_up(job, name, tmp_path, capsys):
    """The files were compared by name alone."""
    assert align._take_up(job)["done"] == ["diagnosis", "training", "evaluation"]
    former = (tmp_path / name).read_text()
    (tmp_path / name).write_text(former.replace('"d"', '"e"').replace('"b"', '"x"').replace("seed: 1", "seed: 2"))
    with pytest.raises(SystemExit) as stopped:
        align._take_up(job)
    assert stopped.value.code == 2
    said = f"align holds results of other contents of {name.partition('/')[0]}; name another --folder"
    assert said in capsys.readouterr().err
    (tmp_path / name).write_text(former)
    assert len(align._take_up(job)["done"]) == 3
    # Nothing has been made of them yet.
    state = json.loads((job.folder / "align.json").read_text())
    align._write(job.folder / "align.json", {**state, "done": []})
    (tmp_path / name).unlink()
    assert align._take_up(job)["done"] == []


def test_other_prompts_are_evaluated_again(job, tmp_path):
    write_jsonl(tmp_path / "suite.jsonl", [{"prompt": "another"}])
    assert align._take_up(job)["done"] == ["diagnosis", "training"]


def test_a_folder_of_an_earlier_version_is_taken_up(job):
    path = job.folder / "align.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: state[name] for name in ("job", "done", "evaluated_with")}))
    assert len(align._take_up(job)["done"]) == 3


def test_the_whole_way_and_on_from_where_it_was_cut_off(model_dir, preference_file, monkeypatch, capsys):
    (given := [str(model_dir), "--data", str(preference_file), "--folder=out"]).extend(
        ["--data.held_out_fraction=0.2", "--trainer.accelerator=cpu", "--max_steps=3", "--lr=1e-3"]
    )
    given += ["--max_prompts=2", "--evaluate.generation.max_new_tokens=2"]

    def cut_off(args):
        raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "main", cut_off)
        with pytest.raises(SystemExit):
            align.main(given)
    assert json.loads(open("out/align.json").read())["done"] == ["diagnosis"]  # noqa: SIM115
    capsys.readouterr()
    align.main(given)
    printed = capsys.readouterr().out
    assert "== diagnosis: done already" in printed
    assert "step 3 of 3" in printed
    page = open("out/report.html").read()  # noqa: SIM115
    for part in ("diagnosis/report.html", "version_0/report.html", "evaluation/report.html", "by definition",
                 "embedded_harmful", ">before<", ">after<"):  # fmt: skip
        assert part in page
    align.main(given)
    assert capsys.readouterr().out.count("done already") == 3
    with pytest.raises(SystemExit):
        align.main([*given, "--beta=0.5"])
    assert "holds another job (it differs in training)" in capsys.readouterr().err


def test_the_whole_way_with_single_answers(tmp_path, capsys):
    """Labelled answers of the embedded set, each to a prompt of its own, for its model."""
    rows = []
    for number, line in enumerate(embedded.TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:40]):
        pair = json.loads(line)
        rows.append({"prompt": pair["prompt"], "completion": pair[("chosen", "rejected")[number % 2]]})
        rows[-1]["label"] = number % 2 == 0
    write_jsonl(tmp_path / "single.jsonl", rows)
    given = ["embedded", "--data=single.jsonl", "--folder=out", "--model.loss=KTOLoss", "--max_steps=2", "--lr=1e-4"]
    given += ["--data.held_out_fraction=0.2", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
    align.main([*given, "--max_prompts=2", "--evaluate.generation.max_new_tokens=2"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "40 answers" in printed
    assert "The labels are balanced" in printed
    out = tmp_path / "out"
    said = {path: path.read_text(encoding="utf-8") for path in (out / "report.html", out / "version_0" / "report.html")}
    said[out] = printed[printed.index("What changed") :]
    for text in said.values():
        assert "held-out answers on their label's side" in html.unescape(text)
        # An answer is compared with none to the same prompt.
        for word in ("held-out pair", "preference accuracy", "the same by log-prob", "the chosen", "it prefers"):
            assert word not in text
    card = (out / "version_0" / "model" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| steps \| 2, of \d+ batches of \d+ answers \|", card)
    assert "| training answers | " in card
    assert "held-out answers, with 95 % intervals" in card
    assert "[arXiv:2402.01306]" in card
    assert "2603.22829" not in card
    columns = (out / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "held_out/accuracy" in columns
    assert "logp_accuracy" not in columns
    assert AutoModelForCausalLM.from_pretrained(out / "version_0" / "model").num_parameters() > 1_000_000
