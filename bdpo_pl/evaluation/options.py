"""The command line of `bdpo_pl.evaluate`: models, and options that may also stand in a YAML file."""

from __future__ import annotations

import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from bdpo_pl.evaluation.answerers import GenerationOptions
from bdpo_pl.evaluation.attacks.choice import AttackOptions
from bdpo_pl.evaluation.gates import Limit, parse_limit
from bdpo_pl.evaluation.judges import registry
from bdpo_pl.evaluation.judges.judge import Judge
from bdpo_pl.evaluation.judges.phrases import PhraseJudge
from bdpo_pl.evaluation.measures.ability import AbilityOptions
from bdpo_pl.evaluation.measures.overfitting import PairsOptions
from bdpo_pl.evaluation.short_forms import EvaluationParser
from bdpo_pl.evaluation.subjects import ServerOptions
from bdpo_pl.evaluation.suites.known import SuiteOptions, split_suites

_PROG = "python -m bdpo_pl.evaluate"


@dataclass
class EvaluateOptions:
    """What is measured, and what is written.

    Args:
        list_suites: print the suites that are known by name, and do nothing else.
        suites: prompts, as `NAME,NAME=FILE,NAME:KIND=FILE`, or as a list whose items may be mappings; see
            `--list_suites`. Default: the small ones that ship with bdpo_pl.
        max_prompts: of each suite at most, spread evenly over it.
        generation: how responses are generated.
        server: how to speak to models that are named by an address.
        judge: who tells what a response is: a short name (`phrases`, `learned`, `classifier`, `llama_guard`,
            `wildguard`, `harmbench`, `shieldgemma`, `chat`) or the `class_path` of a judge of your own.
        labels: file with `prompt`, `response` and `label` (refusal or compliance) or `unsafe`, to measure how far the
            judge agrees with it; `embedded` for the small one of bdpo_pl, the default of offline judges.
        labels_columns: our column → the labelled file's, as in `{response: completion, label: final_label}`.
        labels_by: whose labels they are, for reports.
        attacks: jailbreak framings, GCG, refinement and others, on top of the suites as they are.
        pairs: preference pairs to see overfitting by.
        ability: general ability.
        folder: where report, numbers and verdicts go.
        keep_answers: keep what the models answer beside the verdicts, to judge it anew with another judge; with a
            warning, for it may be harmful.
        show_texts: put prompts and answers that went wrong into the HTML report, with a warning.
        export_answers: file to write every answer to, with its prompt, suite, attack and verdict and an empty label to
            fill in; it is what `labels` takes. With a warning in each row.
        refine: file to write failing prompts to, with the models' own answers as `rejected`; preference rows that lack
            only what you would have them answer.
        fail_if: limits that end the command with status 1, as `SUITE.MEASURE > NUMBER`, several as a list.
        junit: file to write the limits to as JUnit XML.
        summary: file to write a Markdown summary to.
        dtype: of the models' weights: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
        attn_implementation: as in transformers.
        trust_remote_code: run Python code that comes with a model. It runs with your permissions: read it first.
    """

    list_suites: bool = False
    suites: list[str | SuiteOptions] | str | None = None
    max_prompts: int | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    judge: Judge = field(default_factory=PhraseJudge)
    labels: str | None = None
    labels_columns: dict[str, str] = field(default_factory=dict)
    labels_by: str | None = None
    attacks: AttackOptions = field(default_factory=AttackOptions)
    pairs: PairsOptions = field(default_factory=PairsOptions)
    ability: AbilityOptions = field(default_factory=AbilityOptions)
    folder: str = "runs/evaluation"
    keep_answers: bool = False
    show_texts: bool = False
    export_answers: str | None = None
    refine: str | None = None
    fail_if: list[str] | str = field(default_factory=list)
    junit: str | None = None
    summary: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.suites, str):
            self.suites = split_suites(self.suites)
        if isinstance(self.fail_if, str):
            self.fail_if = [self.fail_if]

    def limits(self) -> list[Limit]:
        """The limits of `fail_if`, read."""
        return [parse_limit(text) for text in self.fail_if]


def add_options(parser: Any) -> None:
    """Add the command's options to `parser`."""
    parser.add_argument("--config", action="config", help="YAML file with options, and `models`.")
    # With a default of its own it would silence the models that a file names.
    models = parser.add_argument(
        "models", nargs="*", type=str, default=SUPPRESS, metavar="MODEL",
        help="[label=]folder, hub name[@revision], .ckpt of a run, http://server/v1#name, or embedded",
    )  # fmt: skip
    models.required = False
    parser.add_class_arguments(EvaluateOptions, as_group=False)
    # By its path, so that --print_config can write it.
    parser.set_defaults({"judge": {"class_path": registry.ALIASES["phrases"]}})


def parse(
    args: Sequence[str] | None, description: str | None = None, check: Callable[[Any], None] = lambda parsed: None
) -> tuple[list[str], EvaluateOptions]:
    """The models named, on the command line or in a file, and the options.

    Args:
        args: as given; None: those of this process.
        description: opens the help.
        check: called with what was parsed, before anything is made of it.
    """
    parser = EvaluationParser(prog=_PROG, usage=f"{_PROG} [MODEL ...] [--option VALUE ...]", description=description)
    add_options(parser)
    parsed = parser.parse_args(list(sys.argv[1:] if args is None else args))
    check(parsed)
    chosen = parser.instantiate(parsed)
    named = [chosen.models] if isinstance(chosen.get("models"), str) else chosen.get("models")
    return list(named or []), EvaluateOptions(**{f.name: getattr(chosen, f.name) for f in fields(EvaluateOptions)})
