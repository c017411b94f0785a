"""The command line, from its options to the exported folder."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from children import command
from makers import messy_safe_rlhf_rows, safe_rlhf_row, write_jsonl

from bdpo_pl.fit import main
from bdpo_pl.forward.generation import generate_responses
from bdpo_pl.training.module import PreferenceModule

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(model_dir, preference_file):
    """Options of a small run."""
    return [
        f"--model.policy={model_dir}",
        f"--data.train={preference_file}",
        "--data.held_out_fraction=0.2",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.init_args.lr=2e-3",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.max_epochs=2",
    ]


def run(arguments, **environment):
    """The command in a process of its own."""
    return command("bdpo_pl.fit", arguments, **environment)


def exported(folder="runs/version_0/model"):
    from safetensors.torch import load_file

    return load_file(f"{folder}/model.safetensors")


def test_run_from_options_to_a_folder_that_answers(base, model_dir, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(base)
    printed = capsys.readouterr().out
    for part in ("by definition", "Only 8 held-out pairs", "No safety prompts were given"):
        assert part in printed
    for part in ("What changed", "held-out preference accuracy", "margin gap", "aligned model", "8 optimiser steps"):
        assert part in printed
    folder = tmp_path / "runs" / "version_0"
    with (folder / "metrics.csv").open() as file:
        assert {"gap/margin", "train/loss"} <= set(csv.DictReader(file).fieldnames)
        file.seek(0)
        assert file.readline().startswith("step,epoch,")
    card = (folder / "model" / "README.md").read_text()
    for part in ("## How to cite", "32 of pairs.jsonl", "| held-out preference accuracy | 8 | by definition |",
                 "No safety was measured", "BalancedDPOLoss(beta=0.1", "learning rate 0.002"):  # fmt: skip
        assert part in card
    assert str(model_dir) not in card
    assert str(tmp_path) not in card
    assert "local_files_only" not in (folder / "model" / "tokenizer_config.json").read_text()
    report = (folder / "report.html").read_text()
    for part in ("Margin and its gap", "Drift from the reference", "Only 8 held-out pairs", "torch"):
        assert part in report
    assert "report.html" in printed
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template
    assert model.config.use_cache
    assert generate_responses(model, tokenizer, ["how do i keep my garden safe ?"], max_new_tokens=4)[0] is not None
    before, after = AutoModelForCausalLM.from_pretrained(model_dir).state_dict(), model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    checkpoint = next((folder / "checkpoints").glob("best-step=*.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() == {f"policy.{name}" for name in after}


def test_printed_configuration_gives_the_same_run(base, tmp_path):
    printed = run([*base, "--print_config"])
    assert printed.returncode == 0, printed.stderr
    config = yaml.safe_load(printed.stdout)
    assert config["model"]["loss"]["class_path"] == "bdpo_pl.losses.BalancedDPOLoss"
    assert config["model"]["loss"]["init_args"]["beta"] == 0.1
    (tmp_path / "run.yaml").write_text(printed.stdout)
    main(base)
    main([f"--config={tmp_path / 'run.yaml'}"])
    first, second = exported(), exported("runs/version_1/model")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_help_names_every_group_with_the_defaults_of_a_users_own_run(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help_all"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--config", "--ckpt_path", "--model.policy", "--model.loss", "--data.train", "--safety.harmful",
                   "--trainer.strategy", "--trainer.precision", "--checkpoint.monitor"):  # fmt: skip
        assert option in printed
    assert re.search(r"--data\.batch_size \w+ [^(]*\(type: int, default: 8\)", " ".join(printed.split()))


def test_embedded_run_is_the_default_and_its_options_can_be_changed(capsys, fewer_pairs):
    main([
        "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=false",
        "--model.loss.beta=0.2",
        "--safety.max_prompts=2",
        "--safety.max_new_tokens=4",
        "--export=false",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    counts = f"{fewer_pairs.NUM_TRAIN} pairs", f"{fewer_pairs.NUM_HELD_OUT} pairs"
    for part in (*counts, "refusal rate, harmful prompts", "over-refusal", "2 optimiser steps"):
        assert part in printed
    config = yaml.safe_load(open("runs/version_0/config.yaml").read())  # noqa: SIM115
    assert config["model"]["optimizer"]["init_args"]["lr"] > 1e-5
    assert config["model"]["loss"]["init_args"]["beta"] == 0.2
    assert "aligned model" not in printed


@pytest.mark.parametrize("named", [2, 0])
def test_settings_of_the_embedded_run_do_not_leak_into_others(base, named, capsys):
    """Printed options are a start for a user's own run, also where no model is named yet."""
    with pytest.raises(SystemExit):
        main([*base[:named], "--print_config"])
    options = yaml.safe_load(capsys.readouterr().out)
    assert options["model"]["optimizer"]["init_args"]["lr"] == 1e-6
    assert options["safety"]["harmful"] is None


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([f"--config={config}", "--print_config"])
    assert stopped.value.code == 0
    rate = yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["init_args"]["lr"]
    # Adapters learn at ten times the rate of whole models.
    assert rate == (1e-5 if config.stem.startswith("lora") else 1e-6)


def test_configuration_for_own_data_runs(base):
    main([f"--config={CONFIGS / 'own_data.yaml'}", *base, "--trainer.val_check_interval=1.0", "--data.batch_size=1"])
    assert exported()


def test_loss_by_class_path(base):
    main([*base, "--model.loss=DPOLoss", "--model.loss.label_smoothing=0.1", "--trainer.max_steps=1"])
    config = yaml.safe_load(open("runs/version_0/config.yaml").read())  # noqa: SIM115
    assert config["model"]["loss"]["class_path"] == "bdpo_pl.losses.DPOLoss"


def test_resume_from_the_command_line_ends_in_the_same_weights(base, capsys):
    main([*base, "--checkpoint.save_top_k=-1", "--checkpoint.save_weights_only=false"])
    main([*base, "--ckpt_path=runs/version_0/checkpoints/best-step=4.ckpt"])
    printed = capsys.readouterr().out
    assert printed.count("8 optimiser steps") == 2
    # The resumed run knows what the first one began with.
    assert printed.count("by definition") == 2 * (printed.count("by definition") // 2) > 2
    whole, resumed = exported(), exported("runs/version_1/model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_of_few_steps_is_resumed_with_more_in_the_same_epoch(base, capsys):
    main([*base, "--trainer.max_steps=1"])
    main([*base, "--trainer.max_steps=1", "--ckpt_path=last"])
    said = capsys.readouterr().out
    assert said.count("No step was taken: the checkpoint is of step 1, where this run ends") == 1
    main([*base, "--trainer.max_steps=3", "--ckpt_path=last"])
    said = capsys.readouterr().out
    assert "3 optimiser steps" in said
    assert "No step was taken" not in said
    last = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["loops"]["fit_loop"]["epoch_progress"]["total"]["ready"] == 1


def test_last_checkpoint_is_written_though_nothing_improves_and_found_again(base, monkeypatch, capsys):
    def stop(module):
        if module.global_step == 6:
            raise KeyError("a fault of the machine")

    base.append("--model.optimizer.init_args.lr=0")
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceModule, "on_validation_start", stop)
        with pytest.raises(KeyError, match="fault of the machine"):
            main([*base, "--trainer.val_check_interval=2"])
    last = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    capsys.readouterr()
    main([*base, "--ckpt_path=last"])
    assert "8 optimiser steps" in capsys.readouterr().out


def test_a_checkpoint_of_weights_alone_is_none_to_resume_from(base, capsys):
    main([*base, "--export=false", "--checkpoint.save_top_k=-1"])
    with pytest.raises(SystemExit) as stopped:
        main([*base, "--ckpt_path=runs/version_0/checkpoints/best-step=4.ckpt"])
    assert stopped.value.code == 2
    assert "holds only weights" in capsys.readouterr().err


def test_last_checkpoint_of_no_run_is_refused(base, capsys):
    with pytest.raises(SystemExit):
        main([*base, "--ckpt_path=last"])
    assert "last.ckpt" in capsys.readouterr().err


def test_messy_safe_rlhf_file_trains_and_reports(base, tmp_path, capsys):
    rows = messy_safe_rlhf_rows() + [
        safe_rlhf_row(f"query {i} ?", [f"bad {i} .", f"good {i} ."], [i % 3 == 0, True], better=i % 2) for i in range(9)
    ]
    path = write_jsonl(tmp_path / "safe_rlhf.jsonl", rows)
    base[1] = f"--data.train={path}"
    main([*base, "--data.max_length=256"])
    printed = capsys.readouterr().out
    assert "What changed" in printed
    assert "of 20 rows" in printed
    for reason in ("both responses unsafe", "missing prompt", "empty response", "missing is_response_0_safe",
                   "chosen = rejected", "longer than 256 tokens", "duplicate of an earlier pair"):  # fmt: skip
        assert f"dropped: {reason}" in printed
    # The same with the giant cut to the window.
    main([*base, "--data.max_length=256", "--data.truncation=keep_start"])
    assert "truncated" in capsys.readouterr().out


def test_two_processes_train_as_one(base, tmp_path):
    """By tokens, where batches differ in their number of pairs; of pairs, `test_samplers` proves the same."""
    budget = "--data.max_tokens_per_batch=300"
    one = run([*base, budget, "--trainer.accumulate_grad_batches=2"])
    assert one.returncode == 0, one.stderr
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    two = run([*base, budget, *ranks], OMP_NUM_THREADS="1", BDPO_PL_CACHE=str(tmp_path / "cache of two"))
    assert two.returncode == 0, two.stderr
    whole, shared = exported(), exported("runs/version_1/model")
    for name in whole:
        torch.testing.assert_close(whole[name], shared[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "options", "fault"),
    [
        ({"prompt": "a ?", "chosen": "b ."}, [], "missing column.*'rejected'"),
        ({"prompt": "a ?", "chosen": "b .", "rejected": ""}, [], "line 1.*rejected"),
        ({"prompt": "a ?", "chosen": "b .", "rejected": "b ."}, [], "line 1.*chosen.*rejected"),
        ({"prompt": "a " * 900, "chosen": "b .", "rejected": "c ."}, [], "max_length"),
        (None, ["--model.policy=/nowhere/at/all"], "no model folder at '/nowhere/at/all'"),
        (None, ["--data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (None, ["--model.loss.beta=-1"], "beta"),
        (None, ["--model.loss.bta=1"], "bta"),
        (None, ["--model.reference_mode=none"], "needs a reference"),
        (None, ["--data.bach_size=4"], "bach_size"),
        (None, ["--model.loss=NoSuchLoss"], "NoSuchLoss"),
        (None, ["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (None, ["--trainer.devices=0"], r"error: .*devices"),
        (None, ["--data.train=[bold].jsonl"], r"\[bold\]\.jsonl"),
    ],
)
def test_faults_end_with_status_2_and_their_name(base, tmp_path, capsys, row, options, fault):
    if row is not None:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        base[1] = f"--data.train={tmp_path / 'rows.jsonl'}"
    with pytest.raises(SystemExit) as stopped:
        main([*base, *options])
    assert stopped.value.code == 2

    assert re.search(fault, " ".join(capsys.readouterr().err.split()))


def test_fault_prints_no_traceback(base):
    result = run([*base, "--data.train=nowhere.jsonl"])
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "nowhere.jsonl" in result.stderr


def test_seed_changes_the_order(base):
    main([*base, "--seed_everything=1", "--trainer.max_steps=2"])
    main([*base, "--seed_everything=2", "--trainer.max_steps=2"])
    first, second = exported(), exported("runs/version_1/model")
    assert any(not torch.equal(first[name], second[name]) for name in first)
