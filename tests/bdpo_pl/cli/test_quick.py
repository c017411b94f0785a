"""Help and wrong options, before torch is imported."""

import re
import subprocess
import sys

import pytest
import yaml
from jsonargparse import ArgumentParser

from bdpo_pl.cli import aliases, known, short_help
from bdpo_pl.cli.diagnosing import DiagnoseCLI
from bdpo_pl.cli.job import FitCLI, make_parser
from bdpo_pl.cli.main import COMMANDS, main
from bdpo_pl.cli.quick import answer_early
from bdpo_pl.cli.write_known import collect
from bdpo_pl.evaluation.options import add_options
from bdpo_pl.fit import main as fit
from bdpo_pl.losses import BalancedDPOLoss


def value_of(defaults, name):
    found = defaults
    for part in name.split("."):
        if found is None:
            return None
        if "init_args" in found and part not in found:
            found = found["init_args"]
        found = found[part]
    return found


def test_names_written_down_are_those_of_the_parsers():
    assert collect() == known.read(), "python -m bdpo_pl.cli.write_known writes them down again"


def test_help_shows_the_defaults_of_a_model_of_ones_own():
    parser = make_parser(FitCLI)
    defaults = parser.parse_args(["--model.policy=x", "--data.train=y"])
    shown = {option.name: option.default for group in short_help.SHORT_HELP["fit"].values() for option in group}
    same = ("data.held_out_fraction", "model.loss.beta", "model.optimizer.lr", "model.lr_schedule",
            "model.warmup_ratio", "trainer.max_epochs", "trainer.max_steps", "data.batch_size",
            "trainer.accumulate_grad_batches", "seed_everything", "trainer.devices", "trainer.default_root_dir",
            "export_from")  # fmt: skip
    assert {name: str(value_of(defaults, name)) for name in same} == {name: shown[name] for name in same}
    assert defaults.model.loss.class_path.endswith(shown["model.loss"])
    assert f"{BalancedDPOLoss().tau} for pmi" == shown["model.loss.tau"]
    assert (defaults.model.lora, shown["model.lora.r"]) == (None, "off")
    assert (defaults.safety.harmful, shown["safety.harmful"]) == (None, "none")
    assert (defaults.trainer.precision or "32-true", defaults.trainer.val_check_interval) == ("32-true", None)


def test_help_shows_the_defaults_of_evaluate_and_diagnose():
    evaluate = ArgumentParser()
    add_options(evaluate)
    same = {
        "evaluate": (
            "generation.max_new_tokens", "generation.batch_size", "folder", "keep_answers", "show_texts",
            "dtype", "device", "devices",
        ),
        "diagnose": ("diagnose.strong_ratio", "diagnose.extremes", "diagnose.show_texts"),
    }  # fmt: skip
    for command, parser in (("evaluate", evaluate), ("diagnose", make_parser(DiagnoseCLI))):
        defaults = parser.get_defaults()
        shown = {option.name: option.default for group in short_help.SHORT_HELP[command].values() for option in group}
        found = {name: str(value_of(defaults, name)) for name in same[command]}
        assert {name: value.lower() for name, value in found.items()} == {name: shown[name] for name in found}


def test_help_and_short_spellings_name_options_that_there_are():
    for command, groups in short_help.SHORT_HELP.items():
        table = known.read()[command]
        for option in (option for group in groups.values() for option in group):
            assert option.name in table["options"] or option.name.startswith(tuple(table["open"])), option.name
            assert not option.short or {**aliases.SHORT, **aliases.CHOSEN}[option.short], option.short
    fit = known.read()["fit"]
    for option in (*aliases.SHORT.values(), *(option for option, _ in aliases.CHOSEN.values())):
        assert option in fit["options"] or option.startswith(tuple(fit["open"])), option
    assert 20 <= sum(map(len, short_help.SHORT_HELP["fit"].values())) <= 32
    # The options that pages name for more are those of their commands.
    for command in short_help.SHORT_HELP:
        for name in re.findall(r"--([a-z_.]+)", short_help.page(command).splitlines()[-1]):
            assert name in {*known.read()[command]["options"], "help_all", "print_config"}


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (["--max_steps", "2"], ["--trainer.max_steps", "2", "--trainer.max_epochs=-1"]),
        (["--learning_rate=1e-5"], ["--model.optimizer.lr=1e-5"]),
        (["--report_to", "none"], ["--trainer.logger=false"]),
        (["--logger", "wandb"], ["--trainer.logger=lightning.pytorch.loggers.WandbLogger"]),
        (["--bf16"], ["--trainer.precision=bf16-mixed"]),
        (["--bf16", "--beta=1"], ["--trainer.precision=bf16-mixed", "--model.loss.beta=1"]),
        # The class first: the parser forgets what was said before it.
        (["--beta", "1", "--model.loss", "DPOLoss"], ["--model.loss", "DPOLoss", "--model.loss.beta", "1"]),
        (["--lr=1", "--seed=3", "--model.optimizer=torch.optim.SGD"],
         ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1", "--seed_everything=3"]),
    ],
)  # fmt: skip
def test_short_spellings_are_written_in_full(given, written):
    assert aliases.in_full(given) == written


def test_short_spellings_reach_the_parser():
    given = ["--model.policy=x", "--dataset=y", "--lora_r=8", "--tau=0.5", "--lr=3e-4", "--epochs=3", "--seed=7"]
    parsed = make_parser(FitCLI).parse_args(answer_early("fit", given))
    assert parsed.model.lora.r == 8
    assert parsed.model.loss.init_args.tau == 0.5
    assert parsed.model.optimizer.class_path == "bdpo_pl.training.optim.AdamW"
    assert (parsed.model.optimizer.init_args.lr, parsed.model.optimizer.init_args.weight_decay) == (3e-4, 0.0)
    assert (parsed.trainer.max_epochs, parsed.seed_everything, parsed.data.train) == (3, 7, "y")


def test_settings_of_the_default_optimiser_are_not_handed_to_another():
    given = ["--model.policy=x", "--data.train=y", "--model.optimizer=torch.optim.AdamW"]
    optimizer = make_parser(FitCLI).parse_args(given).model.optimizer
    assert (optimizer.init_args.lr, optimizer.init_args.weight_decay, optimizer.init_args.fused) == (1e-3, 1e-2, None)


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("fit", ["--model.polcy", "x"], "did you mean --model.policy?"),
        ("fit", ["--max_step=3"], "did you mean --max_steps?"),
        ("fit", ["--polcy=3"], "did you mean --model.policy?"),
        ("fit", ["--data.bach_size=4"], "--data.batch_size"),
        ("fit", ["--model.loss.bta=1"], "did you mean --model.loss.beta?"),
        ("fit", ["--model.loss=DPOLoss", "--model.loss.tau=1"], "DPOLoss has no option tau"),
        ("fit", ["--model.loss", "BDPO"], "There are APODownLoss, APOZeroLoss"),
        ("fit", ["--report_to", "wanbd"], "csv, tensorboard, wandb"),
        ("fit", ["--lr", "fast"], "--model.optimizer.lr must be a number at least 0, and finite, got fast"),
        ("evaluate", ["x", "--max_prompts=all"], "--max_prompts must be a number at least 1, got all"),
        ("fit", ["--model.policy", "x"], "add --data.train FILE"),
        ("fit", ["--model.policy=x", "--trainer.max_steps=1"], "add --data.train FILE"),
        ("diagnose", ["--diagnose.show_text", "true"], "did you mean --diagnose.show_texts?"),
        ("evaluate", ["x", "--max_promts=3"], "did you mean --max_prompts?"),
    ],
)
def test_wrong_options_are_refused_in_a_few_lines(command, options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        answer_early(command, options)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) <= 5


def test_logger_without_its_package_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        answer_early("fit", ["--report_to", "tensorboard"])
    assert capsys.readouterr().err == (
        "error: TensorBoardLogger needs the package tensorboard, which is not installed: pip install tensorboard\n"
    )


def test_right_options_pass():
    files = [
        "--config=x.yaml",
        "--model.policy=x",
        "--model.loss.anything=1",
        "--trainer.strategy.x=1",
        "--print_config",
    ]
    assert answer_early("fit", files) == files
    assert answer_early("fit", ["--model.loss=mine.MyLoss", "--model.loss.c=1"])
    assert answer_early("fit", ["--help_all"]) == ["--help"]


@pytest.fixture(scope="module")
def fit_parser():
    return make_parser(FitCLI)


def test_an_option_that_is_null_by_default_may_be_left_out(fit_parser):
    assert fit_parser.parse_args(["--model.policy=x"]).data.train is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--model.optimizer", "Adamm"], "There are ASGD, Adadelta"),
        (["--model.optimizer.lr", "fast"], "error: --model.optimizer.lr must be a number; got fast\n"),
        (
            ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=fast"],
            "error: --model.optimizer.lr must be a number; got fast\n",
        ),
        (
            ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.x=1"],
            "--model.optimizer.x: there is no such option",
        ),
        (["--model.loss.beta=some"], "error: --model.loss.beta must be a number; got some\n"),
        (["--model.loss.tau=some"], "error: --model.loss.tau must be a number or auto or null; got some\n"),
        (["--model.lora.r=some"], "error: --model.lora.r must be a whole number or null; got some\n"),
        (["--data.load.safe_rlhf.num_safe=x"], "data.load.safe_rlhf.num_safe must be a whole number or null; got x\n"),
        (["--data.load.bad_rows=x"], "error: --data.load.bad_rows must be auto, error, drop; got x\n"),
        (["--trainer.max_epochs=some"], "error: --trainer.max_epochs must be a whole number or null; got some\n"),
        (["--model.lora=3"], 'Parser key "model.lora"'),
        (["--model.lr_schedule", "round"], "--model.lr_schedule must be cosine, linear, constant; got round"),
        (["--data.batch_size=null"], "--data.batch_size must be a whole number; got None"),
        (["--trainer.nonsense_of_mine", "1"], "unrecognized arguments: --trainer.nonsense_of_mine"),
    ],
)
def test_what_the_parser_refuses_takes_a_few_lines_too(fit_parser, given, kept, capsys):
    with pytest.raises(SystemExit) as stopped:
        fit_parser.parse_args(["--model.policy=x", "--data.train=y", *given])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert kept in printed
    assert len(printed.splitlines()) <= 5


@pytest.mark.parametrize(
    "arguments", [["--help"], ["fit", "--help"], ["diagnose", "--data.trian=x"], ["evaluate", "--help"]]
)
def test_answers_come_without_torch(arguments):
    script = (
        "import sys\nfrom bdpo_pl.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'lightning'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_one_command_has_all_commands(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert f"usage: bdpo {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["fitt"])
    assert stopped.value.code == 2
    assert "did you mean fit?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "content"),
    [
        ("train", "pairs.csv", "prompt,chosen,rejected\nhow ?,so .,no .\n"),
        ("train", "pairs.json", '[{"prompt": "how ?", "chosen": "so .", "rejected": "no ."}]'),
        ("train", "pairs.jsonl", '{"prompt": "how ?", "chosen": "so .", "rejected": "no ."}\n'),
        ("held_out", "pairs.json", '{"prompt": "how ?", "chosen": "so .", "rejected": "no ."}'),
        ("held_out", "pairs.csv", "prompt,chosen,rejected\nhow ?,so .,no .\n"),
    ],
)
def test_a_file_of_pairs_stays_a_path(tmp_path, capsys, option, name, content):
    """The parser reads other files, which hold options, in the place of their paths."""
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(SystemExit) as ended:
        fit([f"--data.{option}", str(file), "--print_config"])
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"][option] == str(file)
