"""Sample completions: what is generated, where it is logged, and that a resumed run neither loses nor doubles rows."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from completion_ranks import completed, completions
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from safetensors.torch import load_file
from sharded_jobs import spawn
from trackers import Mlflow, TensorBoard, Wandb
from transformers import AutoModelForCausalLM, AutoTokenizer

from bdpo_pl import fit
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.reporting import Page
from bdpo_pl.training.completions import LogCompletions, choose_prompts
from bdpo_pl.training.completions_file import CompletionsFile, Row, read_rows
from bdpo_pl.training.completions_section import add_completions
from bdpo_pl.training.tracking import log_completions

NUMBER, TOKENS = 3, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completions")
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(40))
    write_jsonl(folder / "harmful.jsonl", [{"prompt": f"harmful {i} ?"} for i in range(5)])
    return folder


def command(folder, name, *options):
    """8 steps, validated after every fourth one; every checkpoint holds the whole state."""
    fit.main([
        f"--model.policy={folder / 'model'}", f"--data.train={folder / 'pairs.jsonl'}", "--data.held_out_fraction=0.2",
        "--data.batch_size=4", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.init_args.lr=2e-3",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.val_check_interval=4",
        f"--model.scoring.cache_dir={folder / 'cache'}", f"--trainer.default_root_dir={folder / 'runs'}",
        f"--trainer.logger.init_args.version={name}", *options,
    ])  # fmt: skip
    return folder / "runs" / name


@pytest.fixture(scope="module")
def whole(folder):
    """A run with completions, and with the answers of the safety probe."""
    return command(
        folder, "whole", f"--completions.num_prompts={NUMBER}", f"--completions.max_new_tokens={TOKENS}",
        f"--safety.harmful={folder / 'harmful.jsonl'}", "--safety.max_new_tokens=2",
        "--checkpoint.save_top_k=-1", "--checkpoint.save_weights_only=false",
    )  # fmt: skip


def test_completions_are_those_that_the_model_generates(folder, whole):
    rows = completions(whole)
    mine = [row for row in rows if row["set"] == "held_out"]
    assert [row["step"] for row in mine] == [step for step in (0, 4, 8) for _ in range(NUMBER)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    source = {f"{row['chosen']}|{row['rejected']}" for row in preference_rows(40)}
    for step, path in ((0, folder / "model"), (8, whole / "model")):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        for row in (row for row in mine if row["step"] == step):
            ids = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt").input_ids
            found = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
            assert row["completion"] == tokenizer.decode(found, skip_special_tokens=True).strip()
            assert f"{row['chosen']}|{row['rejected']}" in source
            assert (row["num_tokens"] == TOKENS) == (not row["finished"])
            assert "may be harmful" in row["warning"]
    assert len({row["prompt"] for row in mine}) == NUMBER


def test_answers_of_the_safety_probe_are_logged_with_its_verdict(whole):
    rows = [row for row in completions(whole) if row["set"] == "harmful"]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, f"harmful {i} ?") for step in (0, 8) for i in range(NUMBER)
    ]
    assert {row["refused"] for row in rows} == {False}


def test_report_has_no_texts_unless_they_are_requested(folder, whole):
    page = (whole / "report.html").read_text()
    assert "Texts are left out; --completions.show_texts true includes them." in page
    rows = completions(whole)
    assert not any(row["prompt"] in page for row in rows)
    assert (whole / "completions.jsonl").stat().st_mode & 0o777 == 0o600


def test_training_is_the_same_with_and_without(folder, whole):
    plain = command(folder, "plain")
    assert not (plain / "completions.jsonl").exists()
    assert "Completions" not in (plain / "report.html").read_text()
    theirs = load_file(whole / "model" / "model.safetensors")
    mine = load_file(plain / "model" / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("after", ["step", "end"])
def test_resumed_run_loses_and_doubles_no_row(folder, whole, after):
    expected = completions(whole)
    name = f"resumed-{after}"
    shutil.copytree(whole, folder / "runs" / name)
    # As a process leaves it that was killed while it wrote.
    with (folder / "runs" / name / "completions.jsonl").open("a") as file:
        file.write('{"step": 8, "set": "held')
    checkpoint = {"step": "best-step=4.ckpt", "end": "last.ckpt"}[after]
    resumed = command(
        folder, name, f"--completions.num_prompts={NUMBER}", f"--completions.max_new_tokens={TOKENS}",
        f"--safety.harmful={folder / 'harmful.jsonl'}", "--safety.max_new_tokens=2",
        f"--ckpt_path={folder / 'runs' / name / 'checkpoints' / checkpoint}",
    )  # fmt: skip
    assert completions(resumed) == expected
    assert len(read_rows(resumed)) == 5 * NUMBER


def test_a_run_in_another_folder_begins_a_file_of_its_own(folder, whole):
    resumed = command(
        folder, "other", f"--completions.num_prompts={NUMBER}", f"--completions.max_new_tokens={TOKENS}",
        f"--ckpt_path={whole / 'checkpoints' / 'best-step=4.ckpt'}",
    )  # fmt: skip
    expected = [row for row in completions(whole) if row["step"] == 8 and row["set"] == "held_out"]
    assert completions(resumed) == expected


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tp"])
def test_two_ranks_log_the_rows_of_one_once(folder, strategy):
    if not (folder / "one-completions").exists():
        completed(None, folder, "one-completions", 1)
    spawn(completed, folder, f"{strategy}-completions", 2)
    one, two = (completions(folder / f"{name}-completions") for name in ("one", strategy))
    held_out = [[row for row in rows if row["set"] == "held_out"] for rows in (one, two)]
    # Before training, and after it up to the rounding of gradients, which four tokens hardly show.
    assert held_out[0] == held_out[1]
    # Whole models divide the probe's prompts between ranks; the first rank logs its own.
    asked = [f"harmful {i} ?" for i in ((0, 2, 4) if strategy == "ddp" else (0, 1, 2))]
    assert [row["prompt"] for row in two if row["set"] == "harmful"] == asked * 2


def test_single_answers_have_their_label(folder):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0}
            for i, r in enumerate(preference_rows(24))]  # fmt: skip
    write_jsonl(folder / "single.jsonl", rows)
    run = command(
        folder, "kto", f"--data.train={folder / 'single.jsonl'}", "--model.loss=KTOLoss", "--completions.num_prompts=2",
        "--completions.max_new_tokens=2", "--completions.show_texts=true", "--trainer.max_steps=1",
        "--trainer.val_check_interval=1", "--export=false",
    )  # fmt: skip
    known = {row["completion"]: row["label"] for row in rows}
    found = completions(run)
    assert {row["step"] for row in found} == {0, 1}
    assert all(known[row["answer"]] == row["label"] and row["chosen"] is None for row in found)
    page = (run / "report.html").read_text()
    assert "answer, labelled " in page
    assert "do not publish them" in page
    assert all(row["answer"] in page for row in found)


def test_a_file_of_another_run_is_begun_anew(tmp_path):
    trainer = SimpleNamespace(log_dir=str(tmp_path), is_global_zero=True)
    mine, other = CompletionsFile(), CompletionsFile()
    mine.begin(trainer)
    mine.append([row(step=0), row(step=4)])
    other.begin(trainer)
    other.append([row(step=0, completion="other"), row(step=4)])
    resumed = CompletionsFile()
    resumed.take_up(mine.num_rows, mine.digest)
    with pytest.warns(UserWarning, match="does not hold the rows from before"):
        resumed.begin(trainer)
    assert read_rows(tmp_path) == []
    resumed.append([row(step=8)])
    again = CompletionsFile()
    again.take_up(resumed.num_rows, resumed.digest)
    again.begin(trainer)
    assert [r.step for r in read_rows(tmp_path)] == [8]


def row(**values):
    return Row(**{"step": 4, "set": "held_out", "place": "f.jsonl:1", "prompt": "p", "completion": "c", **values})


@pytest.mark.parametrize("field", ["place", "prompt", "completion", "chosen", "rejected", "set"])
def test_texts_in_the_report_are_escaped(field):
    page = Page("t")
    add_completions(page, [row(**{field: "</pre><script>alert('x')</script> \" onload=\"y"})], True)
    html = page.render()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html


def test_report_shows_the_first_and_last_completion_and_the_verdict():
    page = Page("t")
    add_completions(page, [row(step=s, set="harmful", completion=f"said {s}", refused=s < 8) for s in (0, 4, 8)], True)
    html = page.render()
    assert "policy after step 0, a refusal" in html
    assert "policy after step 8, no refusal" in html
    assert "said 0" in html
    assert "said 4" not in html
    assert html.count("100.0%") == 2


def test_trackers_get_a_table():
    wandb, mlflow, board = [], [], []
    rows = [
        row(num_tokens=2, finished=True).fields(),
        row(completion="# a\n\n<b>", num_tokens=3, finished=True).fields(),
    ]
    log_completions([Wandb(wandb), Mlflow(mlflow), TensorBoard(board)], "held_out", rows, 4)
    columns = ["step", "set", "place", "prompt", "completion", "num_tokens", "finished"]
    data = [[4, "held_out", "f.jsonl:1", "p", "c", 2, True], [4, "held_out", "f.jsonl:1", "p", "# a\n\n<b>", 3, True]]
    assert wandb == [(("completions/held_out", columns, data), {"step": 4})]
    assert mlflow == [("abc", {"columns": columns, "data": data}, "completions/held_out/step-000004.json")]
    ((key, text, step),) = board
    assert (key, step) == ("completions/held_out", 4)
    # In Markdown only a block of code keeps marks from their effect.
    assert "**completion**\n\n    # a\n    \n    <b>\n\n**num_tokens**" in text


def table(prompts):
    pairs = [PreferencePair(prompt, [1], [2]) for prompt in prompts]
    return PairTable.from_pairs(pairs, [0])


def test_prompts_are_different_spread_and_short_enough():
    prompts = [[i // 2, 7] for i in range(20)] + [[50] * 9]
    assert choose_prompts(table(prompts), 3, 8) == [0, 8, 18]
    assert choose_prompts(table(prompts), 99, None) == [*range(0, 20, 2), 20]
    with pytest.raises(InputError, match=r"lower completions\.max_new_tokens"):
        choose_prompts(table(prompts), 3, 1)


def test_line_separators_in_a_text_are_no_ends_of_rows(tmp_path):
    text = "a\u2028b\x85c\nd"
    (tmp_path / "completions.jsonl").write_text(
        json.dumps({**row(completion=text).__dict__}, ensure_ascii=False) + "\n"
    )
    assert [r.completion for r in read_rows(tmp_path)] == [text]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--completions.show_texts=true"], "set completions.num_prompts"),
        (["--completions.num_prompts=-1"], "completions.num_prompts must be at least 0"),
        (
            ["--completions.num_prompts=2", "--data.held_out_fraction=0"],
            "completes held-out prompts, and needs held-out",
        ),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(folder, capsys, monkeypatch, options, fault):
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stopped:
        command(folder, "refused", *options)
    assert stopped.value.code == 2
    assert fault in " ".join(capsys.readouterr().err.split())


def test_strategies_that_cannot_generate_are_refused_by_name():
    class DeepSpeedStrategy:
        pass

    trainer = SimpleNamespace(strategy=DeepSpeedStrategy(), callbacks=[])
    with pytest.raises(InputError, match=r"with ddp and with fsdp2, but trainer\.strategy is DeepSpeedStrategy"):
        LogCompletions(2).setup(trainer, None, "fit")
    LogCompletions(0).setup(trainer, None, "fit")
