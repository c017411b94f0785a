"""Every number option has a range, which is checked at parsing; options that contradict each other are refused."""

import dataclasses
import math
import re
import typing

import pytest
from lightning.pytorch.callbacks import LearningRateMonitor

from bdpo_pl.cli import aligning, diagnosing
from bdpo_pl.cli.combinations import check_monitor, logged_names
from bdpo_pl.cli.diagnosing import DiagnoseCLI
from bdpo_pl.cli.job import FitCLI, make_parser, parse_options
from bdpo_pl.cli.parser import OptionParser
from bdpo_pl.cli.ranges import RANGES, Range, numbers
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.options import EvaluateOptions

# Numbers of classes that are chosen by name: any optimiser, loss or judge may have them.
CHOSEN = {name for name in RANGES if name.startswith(("model.optimizer.", "model.loss.", "judge."))}


def number_options(kind, prefix=""):
    """Options of a type hint that are numbers, those within its dataclasses too."""
    arguments = typing.get_args(kind) if typing.get_origin(kind) is not typing.Literal else ()
    kinds = {k for k in arguments or (kind,) if isinstance(k, type)}
    if kinds & {int, float}:
        yield prefix
    for inner in arguments or (kind,):
        if dataclasses.is_dataclass(inner):
            hints = typing.get_type_hints(inner)
            for field in dataclasses.fields(inner):
                yield from number_options(hints[field.name], f"{prefix}.{field.name}" if prefix else field.name)


@pytest.fixture(scope="module")
def parser():
    return make_parser(DiagnoseCLI)


def training_options(parser):
    for action in parser._actions:
        hint = getattr(action, "_typehint", None) or action.type
        if not action.dest.endswith(".help") and hint is not None:
            yield from number_options(hint, action.dest)


def test_every_number_option_has_a_range(parser):
    found = set(training_options(parser)) | set(number_options(EvaluateOptions))
    assert len(found) > 60
    assert found == RANGES.keys() - CHOSEN


VALUES = ("-1", "0", ".nan", "1" + "0" * 30, "some")


def test_every_number_option_takes_or_refuses_what_it_is_given(parser, capsys):
    """Each in a parser of the same class with that option alone: the whole one takes a while for each."""
    actions = {action.dest: getattr(action, "_typehint", None) or action.type for action in parser._actions}
    groups = {**actions, **typing.get_type_hints(EvaluateOptions)}
    refused = accepted = 0
    for name in RANGES.keys() - CHOSEN:
        group = name
        while group not in groups:
            group = group.rpartition(".")[0]
        alone = OptionParser()
        alone.add_argument(f"--{group}", type=groups[group])
        for value in VALUES:
            status = None
            try:
                parsed = dict(numbers(alone.parse_args([f"--{name}={value}"])))
            except SystemExit as stopped:
                status = stopped.code
            if status is None:
                accepted += 1
                assert RANGES[name].holds(parsed.get(name, 1))
            else:
                said = capsys.readouterr().err
                assert status == 2, (name, value)
                assert group.rpartition(".")[2] in said, (name, value, said)
                refused += 1
    assert refused > 200
    assert accepted > 40


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("model.optimizer.lr=.nan", r"--model.optimizer.lr must be at least 0, and finite; got nan"),
        ("model.optimizer.lr=-1e-3", r"--model.optimizer.lr must be at least 0, and finite; got -0.001"),
        ("model.scoring.chunk_pairs=0", r"--model.scoring.chunk_pairs must be at least 1; got 0"),
        ("model.scoring.batch_tokens=-5", r"--model.scoring.batch_tokens must be at least 1; got -5"),
        ("data.num_workers=-1", r"--data.num_workers must be at least 0 and at most 1024; got -1"),
        ("seed_everything=-1", r"--seed_everything must be at least 0 and at most 4294967295; got -1"),
        ("data.seed=-1", r"--data.seed must be at least 0"),
        ("safety.max_new_tokens=0", r"--safety.max_new_tokens must be at least 1; got 0"),
        ("safety.batch_size=0", r"--safety.batch_size must be at least 1; got 0"),
        ("trainer.val_check_interval=0", r"a share above 0 and at most 1, or a whole number of at least 1; got 0"),
        ("trainer.devices=100000", r"--trainer.devices must be at least -1 and at most 1024; got 100000"),
        ("trainer.devices=" + "9" * 400, r"--trainer.devices must be at least -1 and at most 1024; got inf"),
        ("trainer.accumulate_grad_batches=0", r"--trainer.accumulate_grad_batches must be at least 1; got 0"),
        ("trainer.gradient_clip_val=-1", r"--trainer.gradient_clip_val must be at least 0, and finite; got -1"),
    ],
)
def test_option_value_and_range_are_named(parser, capsys, option, said):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--model.optimizer=torch.optim.AdamW", f"--{option}"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err

    assert re.search(said, error), error


def test_a_file_is_checked_like_the_command_line(parser, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("trainer:\n  gradient_clip_val: -1\n")
    with pytest.raises(SystemExit):
        parser.parse_args([f"--config={file}"])
    assert "trainer.gradient_clip_val must be at least 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(0, 1, open_high=True), [0, 0.5], [1, -0.1, math.nan]),
        (Range(0, 1, open_low=True, share=True, least=1), [1, 7, 0.5, 1.0], [0, 0.0, 1.5, -1]),
        (Range(1), [1, 1e300], [0, math.inf]),
    ],
)
def test_ranges(allowed, inside, outside):
    assert all(map(allowed.holds, inside))
    assert not any(map(allowed.holds, outside))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--data.batch_size=4", "--data.max_tokens_per_batch=99"],
            "data.batch_size and data.max_tokens_per_batch both",
        ),
        (["--data.eval_batch_size=4", "--data.max_tokens_per_batch=99"], "data.eval_batch_size and"),
        (["--export=false", "--export_from=best"], "export is false, so export_from best"),
        (["--export_from=best", "--checkpoint.save_top_k=0"], "save_top_k 0 keeps no checkpoint"),
        (["--export_adapter=true"], "there is no adapter: set model.lora"),
        (["--trainer.devices=1024"], "trainer.devices 1024 would start 1024 processes"),
        (["--trainer.devices=.inf"], "the trainer options do not make a Trainer: `devices` selected with"),
        (["--checkpoint.monitor=held_out/los"], "never logs; did you mean held_out/loss"),
        (["--checkpoint.monitor=gap/margin", "--data.train_probe=false"], "checkpoint.monitor is gap/margin"),
        (["--checkpoint.monitor=held_out/drift_chosen", "--model.loss=SimPOLoss"], "monitor is held_out/drift_chosen"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    args = ["--model.policy=nowhere", "--data.train=nowhere.jsonl", "--trainer.accelerator=cpu", *options]
    with pytest.raises(InputError) as stopped:
        parse_options(FitCLI, args, None)
    assert said in str(stopped.value)


@pytest.mark.parametrize(
    ("command", "options", "refused"),
    [
        (aligning, [], True),
        (aligning, ["--trainer.default_root_dir=others"], False),
        (aligning, ["--ckpt_path=last"], False),
        (aligning, ["--dry_run=true"], False),
        (diagnosing, [], False),
    ],
)
def test_a_run_without_a_logger_does_not_begin_in_the_folder_of_a_finished_one(
    tmp_path, monkeypatch, command, options, refused
):
    """It wrote over last.ckpt, configuration and report."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "summary.json").touch()
    args = ["--model.policy=nowhere", "--data.train=nowhere.jsonl", "--trainer.accelerator=cpu"]
    said = r"runs is the folder of a finished run \(it has summary\.json\), and without a logger"
    with pytest.raises(InputError) as stopped:  # what is not refused finds no model
        command.run([*args, "--trainer.logger=false", *options], None)
    assert (re.match(said, str(stopped.value)) is not None) == refused


@pytest.mark.parametrize("callbacks", ["{}", "LearningRateMonitor", "[{class_path: LearningRateMonitor}]"])
def test_callbacks_of_the_users_own_may_log_what_is_monitored(tmp_path, monkeypatch, callbacks):
    monkeypatch.chdir(tmp_path)
    args = ["--model.policy=nowhere", "--data.train=nowhere.jsonl", "--trainer.accelerator=cpu"]
    monitor = "held_out/loss" if callbacks == "{}" else "own"
    cli = parse_options(FitCLI, [*args, f"--trainer.callbacks={callbacks}", f"--checkpoint.monitor={monitor}"], None)
    assert callbacks == "{}" or any(isinstance(c, LearningRateMonitor) for c in cli.trainer.callbacks)


def test_every_name_that_a_run_logs_can_be_monitored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--model.policy=nowhere", "--data.train=nowhere.jsonl", "--trainer.accelerator=cpu"]
    cli = parse_options(FitCLI, args, None)
    names = logged_names(cli.model, cli.config, cli.config_init.safety)
    assert {"held_out/loss", "train_probe/accuracy", "gap/margin", "train/loss"} <= names
    for name in names:
        check_monitor(name, cli.model, cli.config, cli.config_init.safety)
