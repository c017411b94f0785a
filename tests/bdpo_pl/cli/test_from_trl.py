"""Coming from TRL: every option of TRL has a row that holds, and TRL's documented commands run here."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from makers import preference_rows, write_jsonl

from bdpo_pl.cli import aliases, from_trl, known
from bdpo_pl.cli.combinations import check_combinations
from bdpo_pl.cli.job import FitCLI, make_parser
from bdpo_pl.cli.quick import answer_early
from bdpo_pl.errors import InputError
from bdpo_pl.fit import main

ROOT = Path(__file__).parents[3]
PAGE = from_trl.PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", PAGE.partition("<!-- commands -->")[2].partition("<!-- end")[0], re.S)
PAIRS = [shlex.split(block.replace("\\\n", ""), posix=True) for block in BLOCKS]
PAIRS = [(words[: words.index("bdpo")], words[words.index("bdpo") + 2 :]) for words in PAIRS]


@pytest.fixture(scope="module")
def parser():
    return make_parser(FitCLI)


@pytest.fixture(scope="module")
def peer():
    """TRL's own parser."""
    trl = pytest.importorskip("trl")
    from transformers import HfArgumentParser

    return HfArgumentParser([trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig])


def ours(parser, words):
    words = [f"--config={ROOT / word}" if word.startswith("configs/") else word for word in words if word != "--config"]
    return parser.parse_args(answer_early("fit", words))


def test_every_option_of_trl_has_a_row_and_no_other(peer):
    theirs = {field.name for kind in peer.dataclass_types for field in dataclasses.fields(kind)}
    assert "ld_alpha" in theirs
    # Accelerate's, and the negative forms of two switches.
    beside = {"num_processes", "accelerate_config", "no_gradient_checkpointing", "no_remove_unused_columns"}
    assert theirs - {"datasets"} == from_trl.ROWS.keys() - beside


def test_the_page_has_the_table():
    assert from_trl.written(PAGE) == PAGE, "python -m bdpo_pl.cli.from_trl writes it again"
    for row in from_trl.table().splitlines():
        assert "--" not in re.sub("`[^`]*`", "", row).replace("|---", ""), "an option outside code"


@pytest.mark.parametrize("name", from_trl.ROWS)
def test_a_row_is_what_the_command_line_does(name, capsys):
    row = from_trl.ROWS[name]
    if row.kind == "same":
        assert name in {*aliases.SHORT, *aliases.CHOSEN, "use_peft", *known.read()["fit"]["options"]}
        assert from_trl.answer(name) is None
        return
    assert bool(row.here) == (row.kind == "other")
    assert row.here or row.remark
    assert name not in known.read()["fit"]["options"]
    with pytest.raises(SystemExit) as stopped:
        answer_early("fit", ["--model.policy=x", "--data.train=y", f"--{name}", "1"])
    assert stopped.value.code == 2
    assert (row.here or row.remark) in capsys.readouterr().err


def test_what_a_row_names_parses(parser, monkeypatch):
    # Weights & Biases is not installed.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    # Those of one class together, and each class by itself.
    alone = [
        row.here for row in from_trl.ROWS.values() if re.search(r"--(model\.loss|trainer\.(strategy|logger))", row.here)
    ]
    together = " ".join(row.here for row in from_trl.ROWS.values() if row.here and row.here not in alone)
    assert len(alone) > 8
    for options in {*alone, together}:
        parsed = ours(parser, ["--model.policy=x", "--data.train=y", *shlex.split(options)])
        assert "WeightedSum" not in options or len(parsed.model.loss.init_args.losses) == 2


VALUES = {
    "learning_rate": lambda c: c.model.optimizer.init_args.lr,
    "num_train_epochs": lambda c: c.trainer.max_epochs,
    "max_steps": lambda c: c.trainer.max_steps,
    "per_device_train_batch_size": lambda c: c.data.batch_size,
    "gradient_accumulation_steps": lambda c: c.trainer.accumulate_grad_batches,
    "max_grad_norm": lambda c: c.trainer.gradient_clip_val,
    "max_length": lambda c: c.data.max_length,
    "output_dir": lambda c: c.trainer.default_root_dir,
    "model_name_or_path": lambda c: c.model.policy,
    "dataset_name": lambda c: c.data.train,
    "dataset_config": lambda c: c.data.subset,
    "dataset_train_split": lambda c: c.data.split,
    "dataset_test_split": lambda c: c.data.held_out_split,
    "logging_steps": lambda c: c.trainer.log_every_n_steps,
    "lr_scheduler_type": lambda c: c.model.lr_schedule,
    "weight_decay": lambda c: c.model.optimizer.init_args.weight_decay,
    "gradient_checkpointing": lambda c: c.model.gradient_checkpointing,
    "beta": lambda c: c.model.loss.init_args.beta,
    "seed": lambda c: c.seed_everything,
    "lora_r": lambda c: (c.model.lora and c.model.lora.r) or 16,
}


def test_there_are_ten_commands():
    assert len(PAIRS) >= 10
    assert sum("lora_r" in " ".join(theirs) for theirs, _ in PAIRS) >= 2


@pytest.mark.parametrize("pair", PAIRS, ids=[" ".join(theirs)[:30] + f"-{i}" for i, (theirs, _) in enumerate(PAIRS)])
def test_a_command_of_trl_and_its_translation_say_the_same(pair, parser, peer, monkeypatch):
    # Weights & Biases is not installed.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    theirs, translated = pair
    # This switch stands alone in TRL's older commands, and has a value now.
    theirs = ["--bf16=true" if word == "--bf16" else word for word in theirs]
    config = ours(parser, translated)
    asked, rest = peer.parse_known_args(theirs)
    values = {name: get(config) for name, get in VALUES.items() if name != "weight_decay" or "--optim" not in theirs}
    wanted = {name: getattr(asked, name) for name in values}
    values["lr_scheduler_type"] = str(values["lr_scheduler_type"])
    wanted["lr_scheduler_type"] = wanted["lr_scheduler_type"] and getattr(
        wanted["lr_scheduler_type"], "value", wanted["lr_scheduler_type"]
    )
    if asked.max_steps > 0 and "--num_train_epochs" not in theirs:
        wanted["num_train_epochs"] = -1  # as many as the steps take
    if wanted["output_dir"] is None:
        wanted["output_dir"] = "runs"
    assert values == wanted
    if asked.eval_steps:
        assert config.trainer.val_check_interval == asked.eval_steps * asked.gradient_accumulation_steps
    assert (config.model.lora is not None) == asked.use_peft
    if asked.use_peft:
        family = "gpt2" if asked.model_name_or_path == "gpt2" else "qwen2"
        mapping = pytest.importorskip("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        assert config.model.lora.target_modules == (asked.lora_target_modules or mapping[family])
    assert config.model.loss.class_path.endswith("CPOLoss" if "cpo.py" in " ".join(theirs) else "DPOLoss")
    assert config.trainer.precision == ("16-mixed" if "fp16" in rest else "bf16-mixed")
    # What TRL's parser leaves over is the program's name and Accelerate's own.
    left = [word for word in rest if word.startswith("--")]
    assert set(left) <= {"--num_processes", "--mixed_precision", "--accelerate_config"}


def test_layers_that_peft_has_for_a_model_are_said_as_they_are():
    mapping = pytest.importorskip("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    said = (from_trl.ROWS["lora_target_modules"].remark, (ROOT / "configs" / "trl_defaults.yaml").read_text())
    for family, named in {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gpt2": "GPT-2"}.items():
        layers = f"[{','.join(mapping[family])}]"
        assert all(layers in text and named in text for text in said)


def test_the_defaults_of_trl_go_with_batches_by_tokens(parser):
    given = ["configs/trl_defaults.yaml", "--model.policy=x", "--data.train=y", "--data.max_tokens_per_batch=16384"]
    check_combinations(ours(parser, given), parser.get_defaults())


@pytest.mark.parametrize(("at", "steps"), [(1, 2), (2, 3)])
def test_a_translated_command_runs(at, steps, model_dir, preference_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    replaced = {
        "--model_name_or_path": str(model_dir),
        "--dataset_name": str(preference_file),
        "--max_steps": str(steps),
        "--config": str(ROOT / "configs" / "trl_defaults.yaml"),
        "--data.held_out": str(preference_file),
    }
    words = list(PAIRS[at][1])
    for name, value in replaced.items():
        if name in words:
            words[words.index(name) + 1] = value
    if "--max_steps" not in words:
        words += ["--max_steps", str(steps)]
    if "--trainer.val_check_interval" in words:
        words[words.index("--trainer.val_check_interval") + 1] = "16"
    main([*words, "--use_cpu", "--max_length=128", "--trainer.enable_progress_bar=false"])
    folder = tmp_path / words[words.index("--output_dir") + 1] / "version_0"
    saved = json.loads((folder / "summary.json").read_text())
    assert saved["rows"]
    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (
            ["--gradient_checkpointing", "--beta", "1"],
            ["--model.gradient_checkpointing=true", "--model.loss.beta", "1"],
        ),
        (["--gradient_checkpointing", "false"], ["--model.gradient_checkpointing=false"]),
        (
            ["--activation_offloading", "--beta", "1"],
            ["--model.activation_offloading=true", "--model.loss.beta", "1"],
        ),
        (["--bf16", "true", "--fp16", "false"], ["--trainer.precision=bf16-mixed"]),
        (["--bf16=false"], ["--trainer.precision=32-true"]),
        (["--use_peft", "true", "--lora_r", "8"], ["--model.lora.r", "8"]),
        (["--lora_r=8", "--use_peft"], ["--model.lora.r=8"]),
        (["--load_in_4bit", "false", "--use_dora=false", "--use_rslora", "False", "--beta=1"], ["--model.loss.beta=1"]),
        (["--use_dora", "false", "--lora_r=8"], ["--model.lora.dora=false", "--model.lora.r=8"]),
        (["--use_dora", "--load_in_4bit=false"], ["--model.lora.dora=true", "--model.lora.quantize=none"]),
        (["--max_steps", "1000"], ["--trainer.max_steps", "1000", "--trainer.max_epochs=-1"]),
        (["--max_steps=-1"], ["--trainer.max_steps=-1"]),
        (["--max_steps=9", "--epochs=2"], ["--trainer.max_steps=9", "--trainer.max_epochs=2"]),
        (["--trainer.max_steps=9"], ["--trainer.max_steps=9"]),
    ],
)
def test_switches_as_trl_has_them(given, written):
    assert aliases.in_full(given) == written


@pytest.mark.parametrize(
    "given",
    [
        ["--use_peft"],
        ["--use_peft", "false", "--lora_r=8"],
        ["--use_peft", "--load_in_4bit", "false"],
        ["--use_peft", "--use_dora=false"],
    ],
)
def test_use_peft_that_would_do_nothing_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        answer_early("fit", given)
    assert "--lora_r 16" in capsys.readouterr().err


def test_an_adapter_switch_that_is_off_beside_a_file_is_refused():
    with pytest.raises(InputError, match=r"--model.lora.quantize=none"):
        aliases.in_full(["--config", "a.yaml", "--load_in_4bit", "false"])


def test_steps_are_taken_beyond_one_epoch_as_trl_takes_them(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    pairs = write_jsonl(tmp_path / "few.jsonl", preference_rows(12))
    main([
        "--model.policy", str(model_dir), "--data.train", str(pairs), "--data.held_out_fraction=0.4", "--max_steps=5",
        "--batch_size=4", "--use_cpu", "--max_length=128", "--output_dir=runs", "--trainer.enable_progress_bar=false",
        "--export=false",
    ])  # fmt: skip
    saved = torch.load(tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
