"""Command line of `bdpo_pl.evaluate`: models, and options that a YAML file may also hold."""

from __future__ import annotations

import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answerers import GenerationOptions
from bdpo_pl.evaluation.attacks.budget import BudgetOptions
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
    """Measurements and outputs of an evaluation.

    Args:
        list_suites: print the known suites and exit.
        suites: prompts, as `NAME,NAME=FILE,NAME:KIND=FILE`, or as a list whose items may be mappings; see
            `--list_suites`. Default: the small suites that ship with bdpo_pl.
        max_prompts: maximum number of prompts of each suite, spread evenly over it.
        generation: options of generating the responses.
        server: options of requests to models that are given by an address.
        judge: judge that classifies the responses: a short name (`phrases`, `learned`, `classifier`, `llama_guard`,
            `wildguard`, `shieldgemma`, `harmbench`, `harmbench_mistral`, `jailbreakbench`, `strongreject`,
            `strongreject_rubric`, `chat`) or the `class_path` of a judge of your own.
        labels: file with `prompt`, `response` and `label` (refusal or compliance) or `unsafe`, to measure the judge's
            agreement with it; `embedded` for the small file of bdpo_pl, the default for offline judges.
        labels_columns: mapping from our column names to yours, such as `{response: completion, label: final_label}`.
        labels_by: origin of the labels, for reports.
        attacks: jailbreak framings, GCG, refinement and others, in addition to the unmodified suites.
        budget: limits of each attack on each model, in requests and minutes.
        pairs: preference pairs to measure overfitting.
        ability: measures of general ability.
        folder: output folder of the report, the numbers and the verdicts.
        keep_answers: keep the models' answers with the verdicts, so that another judge can classify them later. The
            file begins with a warning, because answers may be harmful.
        show_texts: include the prompts and answers of failures in the HTML report, with a warning.
        export_answers: output file for every answer, with its prompt, suite, attack and verdict and an empty label to
            fill in. `labels` reads this file once it is filled in. Each row has a warning.
        refine: output file for failing prompts, with the models' own answers as `rejected`; preference rows that lack
            only the answer that you prefer.
        fail_if: limits that end the command with status 1, as `SUITE.MEASURE > NUMBER`; a list for several.
        junit: output file for the limits, as JUnit XML.
        summary: output file for a Markdown summary.
        dtype: dtype of the models' weights: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
        devices: number of devices that answer suites, each with the whole model in a process of its own, or auto: all
            GPUs. Attacks' searches, pairs, ability and a judge that is loaded here stay on the first device.
        attn_implementation: attention implementation, as in transformers.
        trust_remote_code: run Python code that comes with a model. It runs with your permissions, so read it first.

    Raises:
        InputError: an option is given without the one that it belongs to.
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
    budget: BudgetOptions = field(default_factory=BudgetOptions)
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
    devices: int | Literal["auto"] = 1
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.suites, str):
            self.suites = split_suites(self.suites)
        if isinstance(self.fail_if, str):
            self.fail_if = [self.fail_if]
        if self.junit is not None and not self.fail_if:
            raise InputError("junit is for limits, and there is none: give fail_if, or leave it out")
        for name in ("labels_columns", "labels_by"):
            if getattr(self, name) and self.labels in (None, EMBEDDED):
                raise InputError(f"{name} is for a file of labels of your own, and there is none: give labels")

    def limits(self) -> list[Limit]:
        """Parsed limits of `fail_if`."""
        return [parse_limit(text) for text in self.fail_if]


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to `parser`."""
    parser.add_argument("--config", action="config", help="YAML file with options, and `models`.")
    # No default here: it would override the models that a file names.
    models = parser.add_argument(
        "models", nargs="*", type=str, default=SUPPRESS, metavar="MODEL",
        help="[label=]folder, hub name[@revision], .ckpt of a run, http://server/v1#name, or embedded",
    )  # fmt: skip
    models.required = False
    parser.add_class_arguments(EvaluateOptions, as_group=False)
    # The full class path, so that --print_config can write it.
    parser.set_defaults({"judge": {"class_path": registry.ALIASES["phrases"]}})


def parse(
    args: Sequence[str] | None, description: str | None = None, check: Callable[[Namespace], None] = lambda parsed: None
) -> tuple[list[str], EvaluateOptions]:
    """Parse the command line, and return the models and the options, from it or from a file.

    Args:
        args: command-line arguments; None: those of this process.
        description: first paragraph of the help.
        check: function called with the parsed arguments before they are used.
    """
    parser = EvaluationParser(prog=_PROG, usage=f"{_PROG} [MODEL ...] [--option VALUE ...]", description=description)
    add_options(parser)
    parsed = parser.parse_args(list(sys.argv[1:] if args is None else args))
    check(parsed)
    chosen = parser.instantiate(parsed)
    named = [chosen.models] if isinstance(chosen.get("models"), str) else chosen.get("models")
    return list(named or []), EvaluateOptions(**{f.name: getattr(chosen, f.name) for f in fields(EvaluateOptions)})
