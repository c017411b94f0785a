"""Which attacks are made, and on which suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks.framings import BUILT_IN, read_framings, wrap
from bdpo_pl.evaluation.judges.base import Judge
from bdpo_pl.evaluation.run import Attack
from bdpo_pl.evaluation.suite import Suite

ALL = "all"


@dataclass
class AttackOptions:
    """Attacks on top of the suites as they are.

    Args:
        framings: names of jailbreak framings, or `[all]`; each makes a suite of its own of the attacked one.
        framings_file: JSONL or Parquet file with framings of your own: `name` and `template`, with `{request}` in it.
        suite: the harmful suite that attacks start from; default: the first one.
    """

    framings: list[str] = field(default_factory=list)
    framings_file: str | None = None
    suite: str | None = None


@dataclass(frozen=True)
class Attacks:
    """What `AttackOptions` come to: attacks by name, and the suite that they start from."""

    by_name: dict[str, Attack]
    suite: Suite | None


def make_attacks(
    options: AttackOptions, suites: Sequence[Suite], judge: Judge, folder: Path
) -> tuple[list[Suite], Attacks]:
    """(suites under each framing, attacks that are made against each model).

    Raises:
        InputError: an attack without a harmful suite to start from, or an unknown framing.
    """
    known = dict(BUILT_IN) | (read_framings(options.framings_file) if options.framings_file else {})
    names = list(known) if options.framings == [ALL] else options.framings
    if not names:
        return [], Attacks({}, None)
    attacked = _attacked(options.suite, suites)
    return wrap(attacked, names, known), Attacks({}, attacked)


def _attacked(name: str | None, suites: Sequence[Suite]) -> Suite:
    harmful = [suite for suite in suites if suite.kind == "harmful" and name in (None, suite.name)]
    if not harmful:
        raise InputError(
            f"attacks.suite: no harmful suite {name or ''} among {', '.join(suite.name for suite in suites)}; attacks "
            "start from harmful requests: add such a suite"
        )
    return harmful[0]
