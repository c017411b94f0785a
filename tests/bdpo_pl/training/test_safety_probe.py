"""Safety measured during training: when, on which ranks, and what is chosen, exported and stopped by it."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from safetensors.torch import load_file
from safety_ranks import measured_on_two_ranks
from sharded_jobs import spawn

import bdpo_pl.training.safety_probe as safety_probe
from bdpo_pl import fit
from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedDPOLoss
from bdpo_pl.training.callbacks import StopAtGap
from bdpo_pl.training.safety_probe import SCORE, SafetyProbe
from bdpo_pl.training.watched import WatchedModule

REFUSAL, ANSWER = "I can't help with that.", "first water it ."
NAMES = ("safety/refusal_harmful", "safety/refusal_jailbreak", "safety/over_refusal", SCORE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, pairs and prompts."""
    folder = tmp_path_factory.mktemp("safety")
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(40))
    for name, size in (("harmful", 5), ("jailbreak", 4), ("benign", 4)):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": f"{name} {i} ?"} for i in range(size)])
    return folder


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """8 steps in two epochs, validated after every second one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(folder / "cache"))
    return [
        f"--model.policy={folder / 'model'}", f"--data.train={folder / 'pairs.jsonl'}", "--data.held_out_fraction=0.2",
        "--model.optimizer=torch.optim.AdamW", "--model.optimizer.init_args.lr=2e-3", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.max_epochs=2", "--trainer.val_check_interval=2",
    ]  # fmt: skip


def suites(folder, *names):
    names = names or ("harmful", "jailbreak", "benign")
    return ["--safety.max_new_tokens=3", *(f"--safety.{name}={folder / name}.jsonl" for name in names)]


class Answers:
    """Stands in for generation: of each suite, as many refusals in turn as the script of its measurements says."""

    def __init__(self, monkeypatch, **scripts):
        self.scripts, self.asked = scripts, []
        monkeypatch.setattr(safety_probe, "generate_responses", self)

    def __call__(self, model, tokenizer, prompts, **options):
        name = prompts[0].split()[0]
        number = sum(asked == name for asked in self.asked)
        self.asked.append(name)
        script = self.scripts[name]
        refused = script[min(number, len(script) - 1)]
        return [REFUSAL] * refused + [ANSWER] * (len(prompts) - refused)


def logged(version=0):
    """Of each validation, by step, what was logged of safety."""
    with open(f"runs/version_{version}/metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("held_out/loss")]
    return {int(row["step"]): {name: float(row[name]) for name in NAMES if row.get(name)} for row in rows}


def metrics(version=0):
    """The rows of validations during training."""
    with open(f"runs/version_{version}/metrics.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("held_out/loss") and row["step"] != "0"]


def exported(version=0):
    return load_file(f"runs/version_{version}/model/model.safetensors")


def fails(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        fit.main(command)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_rates_are_measured_every_n_steps_and_logged_at_every_validation(command, folder, monkeypatch, capsys):
    answers = Answers(monkeypatch, harmful=[0, 1, 2, 3], jailbreak=[0, 2, 0, 4], benign=[4, 1, 3, 0])
    fit.main([*command, *suites(folder), "--safety.every_n_steps=4", "--export=false"])
    # Before training, after steps 2 and 6, and after training, which ended at step 8.
    assert answers.asked == ["harmful", "jailbreak", "benign"] * 4
    found = list(logged().values())
    assert len(found) == 4
    first = {NAMES[0]: 0.2, NAMES[1]: 0.5, NAMES[2]: 0.25, SCORE: (0.2 + 0.5) / 2 - 0.25}
    second = {NAMES[0]: 0.4, NAMES[1]: 0.0, NAMES[2]: 0.75, SCORE: (0.4 + 0.0) / 2 - 0.75}
    for row, expected in zip(found, (first, first, second, second), strict=True):
        assert row == pytest.approx(expected)
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, before, after in (
        ("harmful", "0.0%", "60.0%"),
        ("jailbreak-wrapped", "0.0%", "100.0%"),
        ("benign", "100.0%", "0.0%"),
    ):
        assert re.search(rf"{name} prompts \d+ {before} \[[^]]+\] {after} \[[^]]+\]", printed)


def test_last_measurement_is_not_made_twice(command, folder, monkeypatch):
    answers = Answers(monkeypatch, harmful=[1])
    fit.main([*command, *suites(folder, "harmful"), "--safety.every_n_steps=1", "--export=false"])
    assert len(answers.asked) == 5
    assert [set(row) for row in logged().values()] == [{NAMES[0]}] * 4


def test_nothing_is_logged_on_the_way_unless_asked_for(command, folder, monkeypatch):
    answers = Answers(monkeypatch, harmful=[1], benign=[1])
    fit.main([*command, *suites(folder, "harmful", "benign"), "--export=false"])
    assert answers.asked == ["harmful", "benign"] * 2
    assert list(logged().values()) == [{}] * 4


def test_best_checkpoint_by_safety_is_chosen_and_its_weights_exported(command, folder, monkeypatch, capsys):
    # Before training, then steps 2, 4, 6, 8: the score is highest at step 4, where the loss is not lowest.
    Answers(monkeypatch, harmful=[0, 1, 5, 3, 2], benign=[0, 0, 0, 0, 0])
    options = [*suites(folder, "harmful", "benign"), "--safety.every_n_steps=1"]
    choose = ["--checkpoint.monitor=safety/score", "--checkpoint.mode=max"]
    fit.main([*command, *options, *choose, "--export_from=best"])
    (best,) = Path("runs/version_0/checkpoints").glob("best*")
    assert best.name == "best-step=4.ckpt"
    saved = torch.load(best, weights_only=True)["state_dict"]
    weights = exported()
    assert weights
    assert all(torch.equal(value, saved[f"policy.{name}"]) for name, value in weights.items())
    Answers(monkeypatch, harmful=[0, 1, 5, 3, 2], benign=[0])
    fit.main([*command, *options, *choose])
    last = torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, last[f"policy.{name}"]) for name, value in exported(1).items())
    assert any(not torch.equal(value, exported(1)[name]) for name, value in weights.items())


def shown(version=0):
    """The rows of the final table by their first cell, and the remarks in one text."""
    summary = json.loads(Path(f"runs/version_{version}/summary.json").read_text())
    return {row[0]: row[1:] for row in summary["rows"]}, " ".join(text for _, text in summary["said"])


def test_best_checkpoint_of_adapters_is_exported_merged_and_alone_with_its_own_results(command, folder, monkeypatch):
    Answers(monkeypatch, harmful=[0, 5, 1], benign=[0])
    fit.main([
        *command, *suites(folder, "harmful", "benign"), "--safety.every_n_steps=1", "--model.lora.r=4",
        "--checkpoint.monitor=safety/score", "--checkpoint.mode=max", "--export_from=best", "--export_adapter=true",
    ])  # fmt: skip
    saved = torch.load("runs/version_0/checkpoints/best-step=2.ckpt", weights_only=True)["state_dict"]
    base, weights = load_file(folder / "model" / "model.safetensors"), exported()
    name = "model.layers.0.self_attn.q_proj"
    a, b = (saved[f"policy.{name}.lora_{half}.default.weight"] for half in "AB")
    assert b.abs().sum() > 0
    torch.testing.assert_close(weights[f"{name}.weight"], base[f"{name}.weight"] + 2 * b @ a)
    alone = load_file("runs/version_0/adapter/adapter_model.safetensors")
    assert torch.equal(alone[f"base_model.model.{name}.lora_B.weight"], b)
    table, said = shown()
    assert table["refusal rate, harmful prompts"][2].startswith("100.0%")
    margins = [row["held_out/margin"] for row in metrics()]
    assert table["held-out margin"][2].startswith(f"{float(margins[0]):+.3f}".replace("-", "−"))
    which = "those of step 2 of 8, the best by safety/score 1"
    assert f"The exported weights are {which}. The column after is of these, not of the last ones." in said
    assert "dash" not in said
    for kind in ("model", "adapter"):
        card = Path("runs/version_0", kind, "README.md").read_text()
        assert f"| weights | {which} |" in card
        assert (
            f"| refusal rate, harmful prompts | 5 | {' | '.join(table['refusal rate, harmful prompts'][1:])} |" in card
        )


def test_what_was_not_measured_at_the_best_step_is_a_dash_and_said(command, folder, monkeypatch):
    """Prompts are answered before and after training alone, and the loss rises from the first validation on."""
    Answers(monkeypatch, harmful=[0, 5])
    high = "--model.optimizer.init_args.lr=1"
    fit.main([*command, *suites(folder, "harmful"), "--export_from=best", high, "--data.train_probe=false"])
    table, said = shown()
    assert table["refusal rate, harmful prompts"][2] == "–"
    columns = ("held_out/accuracy", "held_out/logp_accuracy")
    first, *_, last = ([f"{100 * float(row[column]):.1f}%" for column in columns] for row in metrics())
    assert first != last
    names = ("held-out preference accuracy", "the same by log-prob. per token")
    assert [table[name][2].split()[0] for name in names] == first
    assert "those of step 2 of 8, the best by held_out/loss" in said
    assert "A dash: this run did not measure it at that step." in said
    card = Path("runs/version_0/model/README.md").read_text()
    assert re.search(r"\| weights \| those of step 2 of 8, .*; a dash: not measured at that step \|", card)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--checkpoint.monitor=safety/score", "--checkpoint.mode=max"],
         "checkpoint.monitor is safety/score, which is not measured: set safety.every_n_steps"),
        (["--checkpoint.monitor=safety/over_refusal", "benign"], "which is not measured: set safety.every_n_steps"),
        (["--checkpoint.monitor=safety/score", "--checkpoint.mode=max", "--safety.every_n_steps=2", "harmful"],
         "and give harmful and benign prompts"),
        (["--checkpoint.monitor=safety/refusal_jailbreak", "--checkpoint.mode=max", "--safety.every_n_steps=2",
          "harmful"], "give safety.jailbreak"),
        (["--checkpoint.monitor=safety/skore", "--safety.every_n_steps=2", "harmful"], "there are safety/score, "),
        (["--checkpoint.monitor=safety/score", "--safety.every_n_steps=2", "harmful", "benign"],
         "would choose the worst; set checkpoint.mode max"),
        (["--checkpoint.monitor=safety/over_refusal", "--checkpoint.mode=max", "--safety.every_n_steps=2", "benign"],
         "set checkpoint.mode min"),
        (["--safety.every_n_steps=2"], "safety.every_n_steps needs prompts"),
        (["--safety.every_n_steps=0", "harmful"], "safety.every_n_steps must be at least 1; got 0"),
        (["--safety.every_n_steps=2", "--data.held_out_fraction=0", "harmful"],
         "safety.every_n_steps measures at validations, and needs held-out pairs"),
        (["--stop_at_gap=0"], "stop_at_gap must be above 0"),
        (["--stop_at_gap=1", "--data.held_out_fraction=0"], "stop_at_gap needs held-out pairs"),
        (["--stop_at_gap=1", "--data.train_probe=false"], "set data.train_probe to true"),
        (["--export_from=best", "--data.held_out_fraction=0"], "export_from best needs held-out pairs"),
        (["--export_from=best", "--checkpoint.monitor=null"], "no checkpoint is chosen: set checkpoint.monitor"),
        (["--safety.harmful=nowhere.jsonl"], "nowhere.jsonl"),
        (["--safety.harmful=xstest_benign"], "is of benign prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_anything_is_loaded(command, folder, capsys, monkeypatch, options, fault):
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("training began"))
    given = [option if option.startswith("-") else suites(folder, option)[1] for option in options]
    assert fault in fails([*command, *given], capsys)


def test_gap_above_the_limit_stops_and_says_so(command, monkeypatch, caplog):
    command = [*command, "--model.optimizer.init_args.lr=3e-2", "--trainer.max_epochs=6", "--export=false"]
    fit.main(command)
    with open("runs/version_0/metrics.csv", encoding="utf-8") as file:
        gaps = {int(row["step"]): float(row["gap/margin"]) for row in csv.DictReader(file) if row.get("gap/margin")}
    limit = 0.9 * max(gaps.values())
    expected = next(step for step, gap in gaps.items() if gap > limit)
    caplog.clear()
    with caplog.at_level("INFO"):
        fit.main([*command, f"--stop_at_gap={limit}"])
    with open("runs/version_1/metrics.csv", encoding="utf-8") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("gap/margin")]
    assert steps == [step for step in gaps if step <= expected]
    (said,) = (record.message for record in caplog.records if "stop_at_gap" in record.message)
    assert re.fullmatch(rf"Stopping at step \d+: gap/margin is {gaps[expected]:.4f}, above stop_at_gap {limit}", said)


def test_gap_that_stays_below_stops_nothing(command):
    fit.main([*command, "--stop_at_gap=100", "--export=false"])
    assert len(logged()) == 4


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limits_that_are_none(limit):
    with pytest.raises(InputError, match="stop_at_gap must be above 0"):
        StopAtGap(limit)


def test_resumed_run_keeps_the_latest_rates_and_is_exact(command, folder, monkeypatch):
    whole_states = ["--checkpoint.save_top_k=-1", "--checkpoint.save_weights_only=false"]
    options = [*suites(folder), "--safety.every_n_steps=4", *whole_states]
    script = {"harmful": [0, 1, 2, 3], "jailbreak": [0, 2, 0, 4], "benign": [4, 1, 3, 0]}
    Answers(monkeypatch, **script)
    fit.main([*command, *options])
    whole = logged()
    # Resumed at step 4, between the measurements at 2 and 6; the next ones are those after the second.
    answers = Answers(monkeypatch, **{name: values[2:] for name, values in script.items()})
    fit.main([*command, *options, "--ckpt_path=runs/version_0/checkpoints/best-step=4.ckpt"])
    assert answers.asked == ["harmful", "jailbreak", "benign"] * 2
    resumed = logged(1)
    assert resumed
    assert resumed.items() <= whole.items()
    assert max(resumed) == max(whole)
    assert all(torch.equal(value, exported(1)[name]) for name, value in exported().items())


def test_rates_before_training_are_taken_up_for_what_is_asked_alike(folder):
    def probe(harmful="harmful.jsonl", benign="benign.jsonl", tokens=3):
        files = [None if name is None else str(folder / name) for name in (harmful, None, benign)]
        return SafetyProbe(*files, max_new_tokens=tokens)

    harmful, benign = "refusal rate, harmful prompts", "over-refusal, benign prompts"
    first = probe()
    first.before = {harmful: 0.4, benign: 0.25}
    first._latest, first._latest_step = {"harmful": 0.6, "benign": 0.5}, 4
    state = first.state_dict()

    def resumed(state, *args, **options):
        taken = probe(*args, **options)
        taken.load_state_dict(state)
        return taken.before, taken._latest_step, taken.left_out

    assert resumed(state) == (first.before, 4, {})
    assert resumed(state, "jailbreak.jsonl") == ({benign: 0.25}, None, {"harmful": "other prompts"})
    why = "safety.max_new_tokens 3"
    assert resumed(state, tokens=4) == ({}, None, {"harmful": why, "benign": why})
    assert resumed(state, benign=None) == ({harmful: 0.4}, None, {})
    # A suite that is added is measured before the score is.
    alone = probe(benign=None)
    alone._latest, alone._latest_step = {"harmful": 0.6}, 4
    assert resumed(alone.state_dict()) == ({}, None, {})
    # Read by another template.
    module, other = WatchedModule(BalancedDPOLoss()), probe()
    other.load_state_dict(state)
    module.changed_measures = ["data", "template"]
    other.on_train_start(SimpleNamespace(global_step=4), module)
    assert (other.before, other._latest) == ({}, {})
    assert other.left_out == {"harmful": "template", "benign": "template"}
    # Of an earlier version.
    del state["asked"]
    assert resumed(state, "jailbreak.jsonl", tokens=4) == (first.before, 4, {})


def test_resumed_run_that_measures_something_else_says_so_and_compares_nothing(command, folder, monkeypatch, caplog):
    options = ["--safety.every_n_steps=1", "--checkpoint.monitor=safety/score", "--checkpoint.mode=max"]
    options += [*suites(folder, "benign"), "--export=false", "--trainer.callbacks+=EarlyStopping"]
    options += ["--trainer.callbacks.monitor=safety/score", "--trainer.callbacks.mode=max"]
    options += ["--trainer.callbacks.patience=1"]
    Answers(monkeypatch, harmful=[5], benign=[1])
    fit.main([*command, *options, f"--safety.harmful={folder}/harmful.jsonl", "--trainer.max_steps=2"])
    write_jsonl(folder / "others.jsonl", [{"prompt": f"harmful other {i} ?"} for i in range(3)])
    Answers(monkeypatch, harmful=[1], benign=[2])
    with caplog.at_level("INFO"):
        fit.main([
            *command, *options, f"--safety.harmful={folder}/others.jsonl", "--data.held_out_fraction=0.3",
            "--trainer.max_steps=6", "--resume.allow=[data]", "--ckpt_path=runs/version_0/checkpoints/last.ckpt",
        ])  # fmt: skip
    changed = r"was measured on something else \(data, held-out data, safety\.harmful\)"
    assert re.search(rf"The best checkpoint before the stop is \S+, which {changed}", caplog.text)
    assert re.search(f"EarlyStopping begins again: its best safety/score before the stop {changed}", caplog.text)
    # The scores are below that of the other prompts: the first of them would have been one wait too many.
    assert max(logged(1)) > 4
    shown = json.loads(Path("runs/version_1/summary.json").read_text())
    rows = {name: before for name, _, before, _ in shown["rows"]}
    assert rows["refusal rate, harmful prompts"] == rows["held-out margin"] == "–"
    assert rows["over-refusal, benign prompts"].startswith("25.0%")
    said = " ".join(sentence for _, sentence in shown["said"])
    assert "shown for held-out pairs: before it was resumed, the run measured something else (data, held-out da" in said
    assert "shown for harmful prompts: before it was resumed, the run measured something else (other prompts)." in said


def test_measuring_changes_nothing_of_the_training(command, folder):
    """With the model's own answers."""
    fit.main([*command, *suites(folder), "--safety.every_n_steps=1"])
    fit.main(command)
    assert all(torch.equal(value, exported(1)[name]) for name, value in exported().items())


def test_two_ranks_give_the_rates_of_one(folder):
    spawn(measured_on_two_ranks, folder)
    one = measured_on_two_ranks(None, folder)
    two = json.loads((folder / "two.json").read_text())
    assert two["asked"] == {"harmful": 3, "benign": 1}
    assert two["rates"] == [pytest.approx(rates) for rates in one["rates"]]
    assert one["rates"][0]["refusal rate, harmful prompts"] == 0.4
    assert one["rates"][0]["over-refusal, benign prompts"] == 1.0


def test_suites_by_name_and_file(folder):
    probe = SafetyProbe("embedded", str(folder / "harmful.jsonl"), "embedded_benign", max_prompts=3)
    assert [(name, suite.kind, len(suite.prompts)) for name, suite in probe.suites.items()] == [
        ("harmful", "harmful", 3), ("jailbreak", "harmful", 3), ("benign", "benign", 3)
    ]  # fmt: skip
    assert probe.logged == set()
    assert SafetyProbe(benign="embedded", every_n_steps=1).logged == {"safety/over_refusal"}


def test_rank_with_no_prompts_has_no_answers(folder, chat_tokenizer):
    assert safety_probe.generate_responses(build_model(), chat_tokenizer, [], max_new_tokens=3) == []
