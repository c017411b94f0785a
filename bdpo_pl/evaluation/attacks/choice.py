"""Choice of the attacks, and of the suites that they start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bdpo_pl.errors import InputError, is_given
from bdpo_pl.evaluation.attacks.artifacts import read_artifact
from bdpo_pl.evaluation.attacks.attack import Attack
from bdpo_pl.evaluation.attacks.framings import BUILT_IN, LONG, begin_answers, read_framings, wrap
from bdpo_pl.evaluation.attacks.gcg import GCGAttack, GCGOptions
from bdpo_pl.evaluation.attacks.genetic import GeneticAttack, GeneticOptions
from bdpo_pl.evaluation.attacks.pair import PairAttack, RefinementOptions
from bdpo_pl.evaluation.attacks.tap import TreeAttack, TreeOptions
from bdpo_pl.evaluation.attacks.translations import read_translations, translate, translated
from bdpo_pl.evaluation.chat.completions import OptionNames
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointOptions
from bdpo_pl.evaluation.suites.suite import Suite, spread

ALL = "all"
_HERE = "bdpo_pl.evaluation.attacks"
ALIASES = {
    "gcg": f"{_HERE}.gcg.GCGAttack",
    "genetic": f"{_HERE}.genetic.GeneticAttack",
    "pair": f"{_HERE}.pair.PairAttack",
    "tap": f"{_HERE}.tap.TreeAttack",
}
"""Short name → class path of an attack, in `attacks.more`."""


@dataclass
class AttackOptions:
    """Attacks in addition to the unmodified suites.

    Args:
        framings: names of jailbreak framings, as a list or `a,b`, or `all`. Each gives a separate suite.
        framings_file: JSONL or Parquet file with framings of your own: `name` and `template`, which contains
            `{request}`. All of them are used, in addition to those in `framings`.
        prefill: make answers begin with words that comply with the request, as if the model had written them. This
            gives a separate suite. Not available behind a server.
        translations: CSV, JSONL or Parquet file with translations of requests: `request`, `language` and `text`. Each
            language gives a separate suite.
        languages: languages into which `translator` translates requests, as a list or `a,b`. Each gives a separate
            suite.
        translator: endpoint of the model that translates.
        artifacts: files of JailbreakBench's published attack prompts. Each gives a separate suite.
        gcg: search for adversarial suffixes with the model's own gradients. It takes hours for a real model.
        genetic: recombine the framings for each request by the model's own probabilities, as AutoDAN does.
        refinement: let an attacker rewrite each prompt until it succeeds (PAIR); needs `attacker`.
        tree: let an attacker rewrite each prompt in a tree of attempts that is pruned (TAP); needs `attacker`.
        attacker: endpoint of the attacking model.
        more: attacks by `class_path`, such as those of a package of your own.
        suite: name of the harmful suite that attacks start from. Default: every harmful suite for framings, the first
            one for GCG and the other attacks that search.
        max_prompts: maximum number of prompts of that suite for GCG and the other attacks, spread evenly.
        folder: folder where GCG and the other attacks save their state, so that they can resume. Each file begins with
            a warning, because prompts and answers may be harmful. Default: no state is saved, and an interrupted attack
            starts from the beginning.

    Raises:
        InputError: an attack is requested without the model that it needs, a number is below 1, or an option is given
            that no chosen attack reads.
    """

    framings: list[str] | str = field(default_factory=list)
    framings_file: str | None = None
    prefill: bool = False
    translations: str | None = None
    languages: list[str] | str = field(default_factory=list)
    translator: EndpointOptions | None = None
    artifacts: list[str] | str = field(default_factory=list)
    gcg: GCGOptions | None = None
    genetic: GeneticOptions | None = None
    refinement: RefinementOptions | None = None
    tree: TreeOptions | None = None
    attacker: EndpointOptions | None = None
    more: list[Attack] = field(default_factory=list)
    suite: str | None = None
    max_prompts: int = 50
    folder: str | None = None

    def __post_init__(self) -> None:
        self.framings, self.languages, self.artifacts = (
            value.split(",") if isinstance(value, str) else value
            for value in (self.framings, self.languages, self.artifacts)
        )
        for name in ("refinement", "tree"):
            if getattr(self, name) is not None and self.attacker is None:
                raise InputError(f"attacks.{name} needs a model that attacks: set attacks.attacker.url and .model")
        if self.languages and self.translator is None:
            raise InputError("attacks.languages needs a model that translates: set attacks.translator.url and .model")
        if self.translator is not None and not self.languages:
            raise InputError("attacks.translator needs languages: set attacks.languages")
        if self.max_prompts < 1:
            raise InputError(f"attacks.max_prompts must be at least 1, got {self.max_prompts}")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """Raise `InputError` for an option that no chosen attack reads."""
        led = self.refinement is not None or self.tree is not None
        searches = led or self.gcg is not None or self.genetic is not None or bool(self.more)
        saves = searches or bool(self.languages)
        starts = saves or bool(self.framings or self.framings_file or self.prefill or self.translations)
        for name, is_read, read_by in (
            ("attacker", led, "refinement and tree"),
            ("max_prompts", searches, "gcg, genetic, refinement, tree and more"),
            ("folder", saves, "gcg, genetic, refinement, tree, more and languages"),
            ("suite", starts, "attacks on harmful requests"),
        ):
            if not is_read and is_given(self, name):
                raise InputError(f"attacks.{name} is for {read_by}, and none is chosen: choose one, or leave it out")

    @property
    def state_folder(self) -> Path | None:
        """Folder where attacks save their state."""
        return None if self.folder is None else Path(self.folder).expanduser()


@dataclass(frozen=True)
class Attacks:
    """Attacks chosen by `AttackOptions`, and the suite that they start from."""

    chosen: Sequence[Attack]
    suite: Suite | None


def choose_attacks(
    options: AttackOptions, suites: Sequence[Suite], max_prompts: int | None = None
) -> tuple[list[Suite], Attacks]:
    """Return (suites under each framing, attacks that are made against each model).

    Args:
        options: options of the attacks.
        suites: suites that attacks start from.
        max_prompts: maximum number of prompts of each suite that is read here, spread evenly over it.

    Raises:
        InputError: there is no harmful suite to start from, two attacks or suites have the same name, a framing is
            unknown, or a file is faulty.
    """
    own = read_framings(options.framings_file) if options.framings_file else {}
    known = dict(BUILT_IN) | dict(LONG) | own
    named = list(options.framings)
    names = [*BUILT_IN, *own] if named == [ALL] else [*named, *(name for name in own if name not in named)]
    attacks: list[Attack] = []
    if options.gcg is not None:
        attacks.append(GCGAttack(options.gcg))
    if options.genetic is not None:
        attacks.append(GeneticAttack(options.genetic, dict(BUILT_IN) | own))
    if options.refinement is not None:
        assert options.attacker is not None
        attacks.append(PairAttack(options.attacker, options.refinement))
    if options.tree is not None:
        assert options.attacker is not None
        attacks.append(TreeAttack(options.attacker, options.tree))
    attacks += options.more
    given = [_some(read_artifact(path), max_prompts, "max_prompts") for path in options.artifacts]
    rewritten = bool(names or options.prefill or options.translations or options.languages)
    if not rewritten and not attacks:
        _check_names([*suites, *given])
        return given, Attacks([], None)
    called = [attack.name for attack in attacks]
    if twice := {name for name in called if called.count(name) > 1}:
        raise InputError(f"attacks: {', '.join(sorted(twice))} is named twice; give an attack of your own another name")
    harmful = _attacked(options.suite, suites)
    framed = [one for suite in harmful for one in wrap(suite, names, known)]
    if options.prefill:
        framed += map(begin_answers, harmful)
    if options.translations:
        framed += [one for suite in harmful for one in translated(suite, read_translations(options.translations))]
    if options.translator is not None:
        translator = Endpoint(options.translator, names=OptionNames("attacks.translator"))
        for suite in harmful:
            texts = translate(suite, options.languages, translator, options.state_folder)
            framed += translated(suite, texts)
    framed += given
    _check_names([*suites, *framed])
    return framed, Attacks(attacks, _some(harmful[0], options.max_prompts, "attacks.max_prompts") if attacks else None)


def _check_names(suites: Sequence[Suite]) -> None:
    names = [suite.name for suite in suites]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"attacks: several suites would be called {', '.join(sorted(repeated))}; give each file once")


def _attacked(name: str | None, suites: Sequence[Suite]) -> list[Suite]:
    harmful = [suite for suite in suites if suite.kind == "harmful" and name in (None, suite.name)]
    if not harmful:
        raise InputError(
            f"attacks.suite: no harmful suite {name or ''} among {', '.join(suite.name for suite in suites)}; attacks "
            "start from harmful requests: add such a suite"
        )
    return harmful


def _some(suite: Suite, most: int | None, option: str) -> Suite:
    if most is None or len(suite.prompts) <= most:
        return suite
    dropped = {**suite.dropped, f"beyond {option}": len(suite.prompts) - most}
    return replace(suite, prompts=spread(suite.prompts, most), dropped=dropped)
