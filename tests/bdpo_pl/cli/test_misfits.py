"""Any value for any option is taken, or refused with the option's name: `null` and wrong types too."""

import dataclasses
import typing

import pytest
from jsonargparse import Namespace

from bdpo_pl.cli import known
from bdpo_pl.cli.diagnosing import DiagnoseCLI
from bdpo_pl.cli.job import make_parser
from bdpo_pl.cli.misfits import check_nulls, refuse_misfit
from bdpo_pl.cli.parser import OptionParser
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.options import EvaluateOptions


@dataclasses.dataclass
class Inner:
    count: int = 3
    limit: float | None = None
    mode: typing.Literal["a", "b"] = "a"


HINTS = {
    "many": list[str], "inner": Inner | None, "group.batch_size": int, "text": str | None, "either": int | float,
    "loss": object,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"many": None}, "--many must be a list; got null. Leave it out for its default"),
        ({"inner": Namespace(count=None)}, "--inner.count must be a whole number; got null"),
        ({"inner": {"mode": None}}, "--inner.mode must be a or b; got null"),
        ({"group": Namespace(batch_size=None)}, "--group.batch_size must be a whole number; got null"),
        ({"either": None}, "--either must be a whole number or a number; got null"),
        (
            {"loss": Namespace(class_path="bdpo_pl.losses.SimPOLoss", init_args=Namespace(beta=None))},
            "--loss.beta must be a number; got null",
        ),
    ],
)
def test_null_is_refused_by_the_options_type(given, said):
    with pytest.raises(InputError) as refused:
        check_nulls(Namespace(**given), HINTS)
    assert said in str(refused.value)


def test_null_that_an_option_has_is_taken():
    loss = Namespace(class_path="bdpo_pl.losses.BalancedDPOLoss", init_args=Namespace(max_weight_ratio=None))
    check_nulls(Namespace(many=["a"], inner=Namespace(limit=None), text=None, loss=loss), HINTS)
    check_nulls(Namespace(inner=None, loss=Namespace(class_path="nowhere.Class", init_args=None)), HINTS)


@pytest.mark.parametrize("lines", ["  - r is too small\n  - Expected a set", "  - Expected a set\n  - r is too small"])
def test_what_a_class_refuses_takes_one_line(lines):
    error = ValueError(f"Does not validate\nErrors:\n{lines}\nGiven value: Namespace(r=0)")
    with pytest.raises(InputError, match=r"^these options do not fit: r is too small; Given value: Namespace\(r=0\)$"):
        refuse_misfit(error)
    inner = InputError("lora.r must be at least 1")
    wrapped = ValueError("Does not validate")
    wrapped.__cause__ = inner
    with pytest.raises(ValueError, match="Does not validate") as kept:
        refuse_misfit(wrapped)
    assert kept.value.__cause__ is inner


# Those of numbers are tried in test_ranges.
VALUES = ("-1", "some", "null", "{a: 1}")


def test_every_option_takes_or_refuses_what_it_is_given(capsys):
    """Each in a parser of the same class with that option alone: the whole one takes a while for each."""
    parser = make_parser(DiagnoseCLI)
    groups = {action.dest: getattr(action, "_typehint", None) or action.type for action in parser._actions}
    groups |= typing.get_type_hints(EvaluateOptions)
    table = known.read()
    names = {name.rstrip("+") for command in ("fit", "diagnose", "evaluate") for name in table[command]["options"]}
    refused = taken = 0
    for name in sorted(names):
        group = name
        while group not in groups and "." in group:
            group = group.rpartition(".")[0]
        hint = groups.get(group)
        if hint is None or name.endswith((".help", "config")):
            continue
        alone = OptionParser()
        alone.add_argument(f"--{group}", type=hint)
        for value in VALUES:
            status = None
            try:
                alone.parse_args([f"--{name}={value}"])
            except SystemExit as stopped:
                status = stopped.code
            taken += status is None
            if status is not None:
                said = capsys.readouterr().err
                assert status == 2, (name, value)
                assert group.rpartition(".")[2] in said, (name, value, said)
                assert len(said.splitlines()) <= 5
                refused += 1
    assert refused > 200
    assert taken > 200
