"""Every option of fit is read by something: none is accepted and then ignored."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import bdpo_pl
from bdpo_pl import losses
from bdpo_pl.cli import known
from bdpo_pl.cli.combinations import check_combinations
from bdpo_pl.cli.job import FitCLI, make_parser
from bdpo_pl.data.loading import LoadOptions
from bdpo_pl.data.mixture import DataSource
from bdpo_pl.data.schemas.safe_rlhf import SafeRLHFOptions
from bdpo_pl.errors import InputError
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.scoring.reference_sync import SyncOptions
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.completions import LogCompletions
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.identity import ResumeOptions
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.optim import AdamW
from bdpo_pl.training.safety_probe import SafetyProbe

PACKAGE = Path(bdpo_pl.__file__).parent
OWNERS = {
    "model": PreferenceModule, "model.lora": LoraOptions, "model.scoring": ScoringOptions,
    "model.reference_sync": SyncOptions, "model.optimizer": AdamW, "data": PreferenceDataModule,
    "data.train": DataSource, "data.load": LoadOptions, "data.load.safe_rlhf": SafeRLHFOptions,
    "safety": SafetyProbe, "completions": LogCompletions, "resume": ResumeOptions,
}  # fmt: skip
THEIRS = {"trainer": L.Trainer, "checkpoint": ModelCheckpoint}
# Lightning's command line reads these by itself, before anything is built.
OF_THE_PARSER = {"config", "help", "print_config", "seed_everything"}


def reads(tree):
    """How often each name is read as an attribute."""
    return Counter(n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))


@functools.cache
def reads_anywhere():
    """How often the package reads each name as an attribute."""
    return sum((reads(ast.parse(file.read_text(encoding="utf-8"))) for file in PACKAGE.rglob("*.py")), Counter())


def unread(kind, everywhere=None):
    """Parameters of a class that go nowhere, or into attributes that nothing but the class's own checks reads."""
    everywhere = reads_anywhere() if everywhere is None else everywhere
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    methods = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    makers = [methods[name] for name in ("__init__", "__post_init__") if name in methods]
    own = sum((reads(maker) for maker in makers), Counter())
    if dataclasses.is_dataclass(kind):
        into = {field.name: {field.name} for field in dataclasses.fields(kind)}
        passed: set[str] = set()
    else:
        into, passed = flows(methods["__init__"]) if "__init__" in methods else ({}, set())
    left = []
    for name in parameters(kind):
        attributes = into.get(name, set())
        if name not in passed and not any(everywhere[a] > own[a] for a in attributes):
            left.append(name)
    return left


def flows(init):
    """The attributes that each parameter goes into, and the parameters that are handed on in a call of their own."""
    into, passed = {}, set()
    for statement in ast.walk(init):
        names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in (t for whole in targets for t in ast.walk(whole)):
                if isinstance(target, ast.Attribute):
                    for name in names - {"self"}:
                        into.setdefault(name, set()).add(target.attr)
                elif isinstance(target, ast.Name):
                    # What goes into a local variable goes where that goes.
                    for name in names - {target.id}:
                        into.setdefault(name, set()).add(f"={target.id}")
        elif (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Call)
            and not ast.unparse(statement.value.func).startswith("require_")
        ):
            passed |= names
    for _ in range(3):
        for targets in into.values():
            local = {t.removeprefix("=") for t in targets if t.startswith("=")}
            targets |= {t for name in local for t in into.get(name, set())}
    handed = {name for name, targets in into.items() if {t.removeprefix("=") for t in targets} & passed}
    return into, passed | handed


def parameters(kind):
    return [name for name in inspect.signature(kind).parameters if name not in ("params", "kwargs")]


@pytest.mark.parametrize("group", OWNERS)
def test_every_option_of_a_group_is_read(group):
    assert unread(OWNERS[group]) == []


@pytest.mark.parametrize("name", sorted(n for n in losses.__all__ if n.endswith("Loss") or n == "WeightedSum"))
def test_every_option_of_a_loss_is_read(name):
    kind = getattr(losses, name)
    assert "__init__" not in vars(kind) or unread(kind) == []


def test_every_option_of_the_command_line_belongs_to_one_of_them_or_is_read_by_the_command():
    commands = "".join(file.read_text(encoding="utf-8") for file in (PACKAGE / "cli").glob("*.py"))
    for option in known.read()["fit"]["options"]:
        option = option.removesuffix("+")
        group, _, name = option.rpartition(".")
        if name == "help" or option in OF_THE_PARSER or option in OWNERS or option in THEIRS:
            continue
        if group in THEIRS:
            assert name in inspect.signature(THEIRS[group]).parameters, option
        elif group in OWNERS:
            assert name in parameters(OWNERS[group]), option
        else:
            assert group == "", f"{option}: give its group a class in OWNERS"
            assert f"config.{name}" in commands, f"{option} is accepted, and nothing reads it"


@pytest.fixture(scope="module")
def parser():
    return make_parser(FitCLI)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            ["--data.held_out=b", "--data.held_out_fraction=0.2"],
            "data.held_out_fraction is 0.2, but it would have no effect",
        ),
        (["--data.held_out_split=x"], "a split of data.held_out, which is not set"),
        (["--data.max_prompt_length=9"], "data.truncation is drop"),
        (["--model.reference_mode=none", "--model.reference_dtype=bfloat16"], "model.reference_mode is none"),
        (["--model.reference_mode=live", "--model.scoring.cache_dir=x"], "nothing is cached"),
        (["--model.reference_mode=live", "--model.scoring.chunk_pairs=9"], "there is no scoring pass"),
        (["--model.reference_sync.mixup=0.5"], "model.reference_sync.every is not set"),
        (["--data.train=embedded", "--data.held_out_fraction=0.2"], "the embedded set has held-out pairs of its own"),
        (["--model.policy=.", "--model.revision=main"], "a folder has no revisions"),
        (["--completions.max_new_tokens=9"], "completions.num_prompts is 0"),
        (["--safety.max_new_tokens=9"], "no prompts are given with safety.harmful, "),
        (["--safety.max_prompts=9"], "no prompts are given with safety.harmful, "),
        (["--safety.batch_size=9"], "no prompts are given with safety.harmful, "),
        (["--trainer.limit_predict_batches=9"], "nothing is predicted here"),
    ],
)
def test_an_option_that_another_one_leaves_without_effect_is_refused(parser, options, fault):
    defaults = parser.get_defaults()
    config = parser.parse_args(["--model.policy=a", "--data.train=a", *options])
    with pytest.raises(InputError, match=fault):
        check_combinations(config, defaults)
    without = parser.parse_args(["--model.policy=a", "--data.train=a", *options[:-1]])
    check_combinations(without, defaults)


def test_an_option_that_is_read_is_not_refused(parser):
    options = ["--safety.benign=embedded", "--safety.max_new_tokens=9"]
    check_combinations(parser.parse_args(["--model.policy=a", "--data.train=a", *options]), parser.get_defaults())


def test_the_adapter_alone_may_be_of_the_best_checkpoint(parser):
    options = ["--export=false", "--export_adapter=true", "--export_from=best", "--model.lora.r=4"]
    check_combinations(parser.parse_args(["--model.policy=a", "--data.train=a", *options]), parser.get_defaults())


@pytest.fixture
def places(tmp_path):
    """A file, and a folder with the mark of a saved DatasetDict."""
    (tmp_path / "pairs.jsonl").write_text("{}\n{}\n")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("train", ["{0}/pairs.jsonl", "[{{source: {0}/pairs.jsonl}}]"])
@pytest.mark.parametrize("name", ["split", "subset", "revision"])
def test_what_only_hub_datasets_have_is_refused_of_files(parser, places, train, name):
    defaults = parser.get_defaults()

    def check(*options):
        check_combinations(parser.parse_args(["--model.policy=a", *options]), defaults)

    train = f"--data.train={train.format(places)}"
    check(train)
    with pytest.raises(InputError, match=rf"data\.{name} is x, but it would have no effect: .*leave it out"):
        check(train, f"--data.{name}=x")
    own = f"--data.train=[{{source: {places}/pairs.jsonl, {name}: x}}, {{source: owner/name}}]"
    with pytest.raises(InputError, match=rf"{name} of .*pairs\.jsonl is x, but"):
        check(own)
    # One source that reads it is enough.
    check("--data.train=owner/name", f"--data.{name}=x")
    check(f"--data.train=[{{source: {places}/pairs.jsonl}}, {{source: owner/name}}]", f"--data.{name}=x")


def test_splits_are_those_of_the_pairs_they_are_about(parser, places):
    defaults = parser.get_defaults()

    def check(*options):
        check_combinations(parser.parse_args(["--model.policy=a", *options]), defaults)

    check(f"--data.train={places}/saved", "--data.split=x")
    with pytest.raises(InputError, match=r"data\.revision is x"):
        check(f"--data.train={places}/saved", "--data.revision=x")
    check("--data.train=owner/name", "--data.held_out=owner/other", "--data.held_out_split=x")
    with pytest.raises(InputError, match=r"data\.held_out_split is x"):
        check("--data.train=owner/name", f"--data.held_out={places}/pairs.jsonl", "--data.held_out_split=x")
    check("--data.train=owner/name", f"--data.held_out={places}/pairs.jsonl", "--data.revision=x")
    with pytest.raises(InputError, match=r"split of .*pairs\.jsonl is x"):
        check("--data.train=owner/name", f"--data.held_out={{a: {{source: {places}/pairs.jsonl, split: x}}}}")


class Ignores:
    def __init__(self, used: int, checked: int, kept: int, handed: int, through: int) -> None:
        if checked < 0:
            raise ValueError(checked)
        self.kept = kept
        self.used = used
        local = through + 1
        self.through = local
        print(handed)

    def answer(self) -> int:
        return self.used + self.through


def test_the_walk_finds_an_option_that_is_only_checked_or_only_kept():
    tree = ast.parse(textwrap.dedent(inspect.getsource(Ignores)))
    assert unread(Ignores, reads(tree)) == ["checked", "kept"]
