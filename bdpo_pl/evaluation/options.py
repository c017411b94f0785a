"""The command line of `bdpo_pl.evaluate`: models, and options that may also stand in a YAML file."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jsonargparse import ArgumentParser

from bdpo_pl.evaluation.answering import GenerationOptions
from bdpo_pl.evaluation.attacks.options import AttackOptions
from bdpo_pl.evaluation.judges.options import JudgeOptions
from bdpo_pl.evaluation.measures.ability import AbilityOptions
from bdpo_pl.evaluation.measures.overfitting import PairsOptions
from bdpo_pl.evaluation.suites.known import SuiteOptions

_PROG = "python -m bdpo_pl.evaluate"
_SWITCHES = (
    "--list_suites", "--keep_answers", "--show_texts", "--trust_remote_code", "--judge.trust_remote_code",
    "--generation.use_template", "--ability.embedded",
)  # fmt: skip
_LISTS = (
    "--suites", "--attacks.framings", "--ability.lm_eval", "--judge.refused_labels", "--judge.unsafe_labels",
)  # fmt: skip
# Groups of options that are off unless named; true stands for all of their defaults.
_GROUPS = ("--attacks.gcg", "--attacks.refinement")
_ALONE = ("-h", "--help", "--print_config")


@dataclass
class EvaluateOptions:
    """What is measured, and what is written.

    Args:
        list_suites: print the suites that are known by name, and do nothing else.
        suites: prompts, as `NAME,NAME=FILE,NAME:KIND=FILE`, or as a list whose items may be mappings; see
            `--list_suites`. Default: the small ones that ship with bdpo_pl.
        max_prompts: of each suite at most, spread evenly over it.
        generation: how responses are generated.
        judge: who tells what a response is.
        labels: file with `prompt`, `response` and `label` (refusal or compliance) or `unsafe`, to measure how far the
            judge agrees with it; `embedded` for the small one of bdpo_pl, which the phrases are always measured on.
        attacks: jailbreak framings, GCG and refinement, on top of the suites as they are.
        pairs: preference pairs to see overfitting by.
        ability: general ability.
        folder: where report, numbers and verdicts go.
        keep_answers: keep what the models answer beside the verdicts, to judge it anew with another judge; with a
            warning, for it may be harmful.
        show_texts: put prompts and answers that went wrong into the HTML report, with a warning.
        refine: file to write failing prompts to, with the models' own answers as `rejected`; preference rows that lack
            only what you would have them answer.
        dtype: of the models' weights: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
        attn_implementation: as in transformers.
        trust_remote_code: run Python code that comes with a model. It runs with your permissions: read it first.
    """

    list_suites: bool = False
    suites: list[str | SuiteOptions] | None = None
    max_prompts: int | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    labels: str | None = None
    attacks: AttackOptions = field(default_factory=AttackOptions)
    pairs: PairsOptions = field(default_factory=PairsOptions)
    ability: AbilityOptions = field(default_factory=AbilityOptions)
    folder: str = "runs/evaluation"
    keep_answers: bool = False
    show_texts: bool = False
    refine: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def parse(
    args: Sequence[str] | None, description: str | None = None, check: Callable[[Any], None] = lambda parsed: None
) -> tuple[list[str], EvaluateOptions]:
    """The models named, on the command line or in a file, and the options.

    Args:
        args: as given; None: those of this process.
        description: opens the help.
        check: Called with what was parsed, before anything is made of it.
    """
    parser = ArgumentParser(prog=_PROG, usage=f"{_PROG} [MODEL ...] [--option VALUE ...]", description=description)
    parser.add_argument("--config", action="config", help="YAML file with options, and `models`.")
    # With a default of its own it would silence the models that a file names.
    models = parser.add_argument(
        "models", nargs="*", type=str, default=SUPPRESS, metavar="MODEL",
        help="[label=]folder, hub name[@revision], .ckpt of a run, or embedded",
    )  # fmt: skip
    models.required = False
    parser.add_class_arguments(EvaluateOptions, as_group=False)
    parsed = parser.parse_args(_in_full(sys.argv[1:] if args is None else args))
    check(parsed)
    chosen = parser.instantiate(parsed)
    named = [chosen.models] if isinstance(chosen.get("models"), str) else chosen.get("models")
    return list(named or []), EvaluateOptions(**{f.name: getattr(chosen, f.name) for f in fields(EvaluateOptions)})


def _in_full(args: Sequence[str]) -> list[str]:
    """`args` as the parser takes them: files, then models, wherever they stood, and every option with its value.

    Of lists, `a,b` is short for `[a,b]`; of switches and groups, the name alone is short for true.
    """
    models, options, rest = [], [], list(args)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("-"):
            models.append(name + has_value + value)
        elif name in _ALONE or name.endswith(".help"):
            options.append(name + has_value + value)
        else:
            if not has_value and name in _SWITCHES + _GROUPS and not (rest and _is_value(rest[0])):
                value = "true"
            elif not has_value and rest:
                value = rest.pop(0)
            elif not has_value:
                options.append(name)
                continue
            options.append(f"{name}={_value(name.removesuffix('+'), value)}")
    # A file would take the place of models that were named before it.
    files = [option for option in options if option.startswith("--config=")]
    return files + models + [option for option in options if option not in files]


def _is_value(text: str) -> bool:
    """Whether what follows a switch or a group is its value, and not a model."""
    return text in ("true", "false", "null") or text.startswith("{")


def _value(name: str, value: str) -> str:
    if name in _GROUPS:
        return {"true": "{}", "false": "null"}.get(value, value)
    if name in _LISTS and not value.startswith("[") and value != "null":
        return json.dumps(value.split(","), ensure_ascii=False)
    return value
