"""Which attacks are made, and on which suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answering import GenerationOptions
from bdpo_pl.evaluation.attacks import gcg
from bdpo_pl.evaluation.attacks.attack import AttackResult
from bdpo_pl.evaluation.attacks.framings import BUILT_IN, read_framings, wrap
from bdpo_pl.evaluation.attacks.gcg import GCGOptions
from bdpo_pl.evaluation.attacks.pair import NAME as PAIR
from bdpo_pl.evaluation.attacks.pair import Refinement, RefinementOptions
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointOptions
from bdpo_pl.evaluation.judges.judge import Judge
from bdpo_pl.evaluation.runner import Attack
from bdpo_pl.evaluation.subjects import Subject
from bdpo_pl.evaluation.suites.suite import Suite, spread
from bdpo_pl.forward.generation import generate_responses

ALL = "all"


@dataclass
class AttackOptions:
    """Attacks on top of the suites as they are.

    Args:
        framings: names of jailbreak framings, or `[all]`; each makes a suite of its own of the attacked one.
        framings_file: JSONL or Parquet file with framings of your own: `name` and `template`, with `{request}` in it.
        gcg: search for adversarial suffixes by the model's own gradients; hours for a real model.
        refinement: have an attacker rewrite each prompt until it passes (PAIR); needs `attacker`.
        attacker: the endpoint of the attacking model.
        suite: the harmful suite that attacks start from; default: the first one.
        max_prompts: of it, for GCG and refinement, spread evenly.
        folder: where GCG and refinement keep what they have found so far, to go on from there, with a warning in each
            file: prompts and answers may be harmful. Default: nothing is kept, and an attack begins anew.

    Raises:
        InputError: refinement without an attacker, or a number below 1.
    """

    framings: list[str] = field(default_factory=list)
    framings_file: str | None = None
    gcg: GCGOptions | None = None
    refinement: RefinementOptions | None = None
    attacker: EndpointOptions | None = None
    suite: str | None = None
    max_prompts: int = 50
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.refinement is not None and self.attacker is None:
            raise InputError("attacks.refinement needs a model that attacks: set attacks.attacker.url and .model")
        if self.max_prompts < 1:
            raise InputError(f"attacks.max_prompts must be at least 1, got {self.max_prompts}")


@dataclass(frozen=True)
class Attacks:
    """What `AttackOptions` come to: attacks by name, and the suite that they start from."""

    by_name: dict[str, Attack]
    suite: Suite | None


def make_attacks(
    options: AttackOptions, suites: Sequence[Suite], judge: Judge, generation: GenerationOptions
) -> tuple[list[Suite], Attacks]:
    """(suites under each framing, attacks that are made against each model).

    Raises:
        InputError: an attack without a harmful suite to start from, or an unknown framing.
    """
    known = dict(BUILT_IN) | (read_framings(options.framings_file) if options.framings_file else {})
    names = list(known) if options.framings == [ALL] else options.framings
    if not names and options.gcg is None and options.refinement is None:
        return [], Attacks({}, None)
    attacked = _attacked(options.suite, suites)
    folder = None if options.folder is None else Path(options.folder).expanduser()
    by_name: dict[str, Attack] = {}
    if options.gcg is not None:
        by_name[gcg.NAME] = _gcg(options.gcg, generation, folder)
    if options.refinement is not None:
        assert options.attacker is not None
        by_name[PAIR] = _refinement(options.refinement, Endpoint(options.attacker), judge, generation, folder)
    return wrap(attacked, names, known), Attacks(by_name, _some(attacked, options.max_prompts))


def _gcg(options: GCGOptions, generation: GenerationOptions, folder: Path | None) -> Attack:
    def attack(suite: Suite, model: Any, tokenizer: Any, subject: Subject, step: Callable[[], None]) -> Any:
        # The embedding's gradient is asked for, and no weight's.
        found = gcg.results(
            suite.prompts,
            model,
            tokenizer,
            options,
            use_template=generation.use_template,
            folder=folder,
            on_progress=lambda done, total: step(),
        )
        results = list(found)
        matched = sum(bool(result.details["matched"]) for result in results)
        cost = f"{_steps(results)} of {options.search_width} swaps each; {matched} answers began with the target"
        return _made(suite, gcg.NAME, results), cost

    return attack


def _refinement(
    options: RefinementOptions, attacker: Endpoint, judge: Judge, generation: GenerationOptions, folder: Path | None
) -> Attack:
    def attack(suite: Suite, model: Any, tokenizer: Any, subject: Subject, step: Callable[[], None]) -> Any:
        def respond(prompts: Sequence[str]) -> list[str]:
            return generate_responses(
                model,
                tokenizer,
                prompts,
                max_new_tokens=generation.max_new_tokens,
                batch_size=generation.batch_size,
                use_template=generation.use_template,
            )

        key = f"{subject.fingerprint()} {model.dtype} {generation}"
        refinement = Refinement(attacker, respond, judge, options, target_key=key)
        results = list(refinement.results(suite.prompts, folder=folder, on_progress=lambda done, total: step()))
        queries = sum(int(result.details["queries"]) for result in results)
        unread = sum(int(result.details["unparsable"]) for result in results)
        cost = f"{_steps(results)}; {queries} queries; {unread} answers of {attacker.name} could not be read"
        return _made(suite, PAIR, results), cost

    return attack


def _attacked(name: str | None, suites: Sequence[Suite]) -> Suite:
    harmful = [suite for suite in suites if suite.kind == "harmful" and name in (None, suite.name)]
    if not harmful:
        raise InputError(
            f"attacks.suite: no harmful suite {name or ''} among {', '.join(suite.name for suite in suites)}; attacks "
            "start from harmful requests: add such a suite"
        )
    return harmful[0]


def _some(suite: Suite, most: int) -> Suite:
    left_out = len(suite.prompts) - most
    if left_out <= 0:
        return suite
    dropped = {**suite.dropped, "beyond attacks.max_prompts": left_out}
    return replace(suite, prompts=spread(suite.prompts, most), dropped=dropped)


def _steps(results: Sequence[AttackResult]) -> str:
    return f"{sum(result.steps for result in results):,} steps on {len(results)} prompts"


def _made(suite: Suite, name: str, results: Sequence[AttackResult]) -> Suite:
    return replace(suite, name=f"{suite.name}+{name}", prompts=[result.prompt for result in results])
