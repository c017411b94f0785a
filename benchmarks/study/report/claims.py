"""The paper's claims, each converted to differences whose signs this study can determine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.study.report.results import (
    ABILITY,
    FRAMED_ATTACKS,
    FRAMING_GAP,
    GAP,
    OVER_REFUSAL,
    REFUSAL,
    REFUSAL_CATEGORIES,
    Measure,
    Results,
)
from benchmarks.study.report.statistics import Interval, holm, interval, paired
from benchmarks.study.report.tables import SIGNIFICANT, Group, difference_text, table
from benchmarks.study.run.plan import BDPO, DPO, DPO_BW, DPO_SF, FULL, NO_BALANCE, world_name

HOLDS, FAILS, UNKNOWN, ABSENT = "holds here", "does not hold here", "cannot be told", "not in the records"
# Points that count as no loss, chosen before any result.
TOLERANCE = 2.0
SAFETY = (REFUSAL, REFUSAL_CATEGORIES, FRAMED_ATTACKS)


@dataclass(frozen=True)
class Check:
    """A difference that bears on a claim.

    Attributes:
        claim: the claim, as the paper means it.
        what: the difference, in words.
        find: function of the results and the bound that returns the difference with its interval.
        sign: +1 if the difference is claimed to be above the bound, −1 if below.
        bound: 0, or the largest difference that counts as no loss.
        percent: true for a difference in points, false for one in nats.
    """

    claim: str
    what: str
    find: Callable[[Results, float], Interval]
    sign: int
    bound: float = 0.0
    percent: bool = True


def verdict(found: Interval, adjusted: float, sign: int, bound: float = 0.0) -> str:
    """Return what a difference implies for a claim.

    Args:
        found: difference with its 95 % interval.
        adjusted: Holm's p against `bound`.
        sign: side of `bound` on which the difference is claimed to be.
        bound: bound in the claim.
    """
    if not found.count:
        return ABSENT
    if math.isnan(adjusted) or adjusted >= SIGNIFICANT or found.low <= bound <= found.high:
        return UNKNOWN
    return HOLDS if (found.mean - bound) * sign > 0 else FAILS


def verdicts(results: Results, checks: Sequence[Check]) -> list[tuple[Check, Interval, float, str]]:
    """Return each check with its difference, Holm's p among all of them, and the verdict."""
    found = [check.find(results, check.bound) for check in checks]
    adjusted = holm([one.p for one in found])
    return [
        (check, one, p, verdict(one, p, check.sign, check.bound))
        for check, one, p in zip(checks, found, adjusted, strict=True)
    ]


def claims_table(results: Results, checks: Sequence[Check] | None = None) -> str:
    """Return a table with a row for each difference, under its claim."""
    rows = []
    last = ""
    for check, found, p, said in verdicts(results, CHECKS if checks is None else checks):
        unit = "points" if check.percent else "nats"
        side = {1: "above", -1: "below"}[check.sign]
        bound = f"{check.bound:+g}".replace("-", "−") if check.bound else "0"
        value = difference_text(found, 1 if check.percent else 2)
        shown = f"{value} {unit}" if found.count else value
        p_text = "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
        claim = check.claim if check.claim != last else ""
        rows.append([claim, f"{check.what}: {side} {bound}", shown, p_text, said])
        last = check.claim
    return table(["claim", "holds if", "difference", "p, corrected", "verdict"], rows)


def _final(method: str, section: str = "final", variant: str = "") -> Group:
    return Group(method, section, method, variant)


def _paired(measure: Measure, first: Group, second: Group) -> Callable[[Results, float], Interval]:
    return lambda results, bound: paired(first.series(results, measure), second.series(results, measure), bound)


def _alone(measure: Measure, group: Group) -> Callable[[Results, float], Interval]:
    return lambda results, bound: interval(list(group.series(results, measure).values()), bound)


def _from_reference(measure: Measure, group: Group) -> Callable[[Results, float], Interval]:
    def find(results: Results, bound: float) -> Interval:
        before = list(_final("reference", group.section).series(results, measure).values())
        if not before:
            return interval([])
        return interval([value - before[0] for value in group.series(results, measure).values()], bound)

    return find


def _between(
    claim: str, first: Group, second: Group, note: str = "", measures: Sequence[Measure] = SAFETY
) -> list[Check]:
    """Return checks that `first` is safer than `second`, one for each of `measures`."""
    return [
        Check(
            claim,
            f"{measure.name}, {first.label} − {second.label}{note}",
            _paired(measure, first, second),
            measure.better,
        )
        for measure in measures
    ]


def _checks() -> list[Check]:
    dpo, bdpo, bw, sf = (_final(method.name) for method in (DPO, BDPO, DPO_BW, DPO_SF))
    checks = []
    claim = "DPO gets safer in distribution …"
    checks.append(Check(claim, "refusal, held-out acts, DPO − reference", _from_reference(REFUSAL, dpo), 1))
    claim = "… stays weaker out of distribution …"
    checks.append(Check(claim, "attack success, framed − plain, DPO", _alone(FRAMING_GAP, dpo), 1))
    claim = "… and overfits"
    checks.append(Check(claim, "margin, training − held-out pairs, DPO", _alone(GAP, dpo), 1, percent=False))
    balanced, imbalanced = (
        Group(f"{name} half", "imbalance", DPO.name, f"{name} half") for name in ("balanced", "imbalanced")
    )
    checks += _between("More imbalance in the pairs, less safety of DPO", balanced, imbalanced)
    checks += _between("B-DPO is safer than DPO", bdpo, dpo)
    alike = Group(f"{DPO.name} with its settings", "sensitivity", BDPO.name, NO_BALANCE)
    checks += _between("… than DPO with the same β, learning rate and epochs too", bdpo, alike)
    second = [_final(method.name, "replication") for method in (BDPO, DPO)]
    checks += _between("… with another reference too", second[0], second[1], ", second world")
    for world, _ in FULL.confirmation:
        first, other = (
            Group(f"{method.name}, {world_name(world)}", "confirmation", method.name, world_name(world))
            for method in (BDPO, DPO)
        )
        checks += _between("… asked again, of pairs that no choice has seen", first, other, measures=(FRAMED_ATTACKS,))
    checks.append(Check("B-DPO overfits less than DPO", "gap, B-DPO − DPO", _paired(GAP, bdpo, dpo), -1, percent=False))
    checks += _between("Balance weights alone make DPO safer", bw, dpo)
    checks += _between("The scaling factor alone makes DPO safer", sf, dpo)
    checks += _between("Both together are safer than weights alone …", bdpo, bw)
    checks += _between("… and than the factor alone", bdpo, sf)
    for name in ("CPO", "SimPO", "SafeDPO"):
        checks += _between(f"B-DPO is safer than {name}", bdpo, _final(name))
    claim = "B-DPO costs no general ability"
    checks.append(Check(claim, "ability, B-DPO − DPO", _paired(ABILITY, bdpo, dpo), 1, -TOLERANCE))
    claim = "B-DPO costs no over-refusal (not a claim of the paper)"
    checks.append(Check(claim, "over-refusal, B-DPO − DPO", _paired(OVER_REFUSAL, bdpo, dpo), -1, TOLERANCE))
    online = _final(BDPO.name, "sensitivity", "comprehension every 10 steps")
    claim = "Comprehension estimated online helps (the paper's open question)"
    checks.append(
        Check(claim, "attack success, unseen framings, online − once", _paired(FRAMED_ATTACKS, online, bdpo), -1)
    )
    return checks


CHECKS = _checks()
"""All checks, a family for Holm's correction."""
