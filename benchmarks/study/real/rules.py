"""The rules that `docs/study_real.md` registered, applied to the records: what the study says, and what it does not."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.study.real.plan import HALVES, SEEDS
from benchmarks.study.real.results import (
    BDPO,
    DPO,
    GAP,
    OUTCOMES,
    PAIR_OUTCOMES,
    RANKED,
    REFUSED,
    SAFE_REFUSED,
    against,
    confirmed,
    group,
    half,
)  # fmt: skip
from benchmarks.study.report.results import Measure, Results
from benchmarks.study.report.statistics import Interval, holm, interval
from benchmarks.study.report.tables import SIGNIFICANT, contrast

FLOOR, CEILING = 5.0, 95.0
"""Shares in percent beyond which a rate of refusal is a floor or a ceiling, not a result."""

SHARP = "B-DPO, τ 0.25"
_DECIDING, _GUARDING = (GAP, REFUSED), (RANKED, SAFE_REFUSED)


@dataclass(frozen=True)
class Answer:
    """The registered question's answer.

    Attributes:
        verdict: `helps`, `harms`, `both` (one outcome is better, the other one worse), `not told`, or `not finished`.
        seeds: number of seeds that both methods have.
        found: difference B-DPO − DPO by outcome.
        adjusted: p after Holm's correction, by outcome.
    """

    verdict: str
    seeds: int
    found: dict[str, Interval]
    adjusted: dict[str, float]


def answer(results: Results) -> Answer:
    """Apply the registered rule.

    B-DPO helps if the gap or the refusals of harmful prompts are better after Holm's correction over the four outcomes,
    and neither test pairs nor safe prompts have a 95 % interval that lies wholly on the worse side; harms: the mirror.
    An outcome at a floor or ceiling is no result: it decides nothing, and only guards.
    """
    found = {measure.name: against(BDPO, DPO).of(results, measure) for measure in OUTCOMES}
    adjusted = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    seeds = min(one.count for one in found.values())
    at_bounds = bounds(results)

    def moved(sign: int) -> bool:
        decides = any(
            m.name not in at_bounds and adjusted[m.name] < SIGNIFICANT and found[m.name].mean * m.better * sign > 0
            for m in _DECIDING
        )
        return decides and not any(_wholly(found[m.name], -m.better * sign) for m in _GUARDING)

    better, worse = moved(1), moved(-1)
    verdict = "both" if better and worse else "helps" if better else "harms" if worse else "not told"
    return Answer(verdict if seeds == len(SEEDS) else "not finished", seeds, found, adjusted)


def _wholly(found: Interval, sign: int) -> bool:
    """Return true if the whole interval is above 0 (`sign` 1) or below it (−1)."""
    return found.low > 0 if sign > 0 else found.high < 0


def bounds(results: Results) -> dict[str, str]:
    """Return the rates of refusal at a floor or ceiling, by outcome, with a sentence that says so.

    A rate is there if it is before training, or after it under both DPO and B-DPO.
    """
    said = {}
    before = results.pick("final", "reference")
    for measure in (REFUSED, SAFE_REFUSED):
        if before and (bound := _bound(measure.of(before[0]))):
            said[measure.name] = f"{measure.name}: {measure.of(before[0]):.1f} % before training, {bound}"
            continue
        means = [interval(list(group(name).series(results, measure).values())).mean for name in (DPO, BDPO)]
        if (bound := _bound(means[0])) and bound == _bound(means[1]):
            said[measure.name] = f"{measure.name}: {means[0]:.1f} and {means[1]:.1f} % after DPO and B-DPO, {bound}"
    return said


def _bound(share: float) -> str:
    if share < FLOOR:
        return f"a floor (under {FLOOR:.0f} %)"
    return f"a ceiling (over {CEILING:.0f} %)" if share > CEILING else ""


def observation(results: Results) -> tuple[str, Interval]:
    """Return what is said of observation (b), and the difference of the gaps, imbalanced − balanced.

    Returns:
        `holds` if the gap is larger on the imbalanced side after Holm's correction over the four outcomes, `opposite`
        if it is smaller, `not told`, or `not finished`; and the difference in nats.
    """
    compared = contrast(half(HALVES[1]), half(HALVES[0]))
    found = [compared.of(results, measure) for measure in PAIR_OUTCOMES]
    at = PAIR_OUTCOMES.index(GAP)
    gap = found[at]
    if gap.count < len(SEEDS):
        return "not finished", gap
    if holm([one.p for one in found])[at] >= SIGNIFICANT:
        return "not told", gap
    return "holds" if gap.mean > 0 else "opposite", gap


def confirmation(results: Results) -> tuple[str, Interval]:
    """Return whether the smaller margin gap is confirmed on a second model, and the difference B-DPO − DPO in nats.

    Returns:
        `confirmed` if its 95 % interval lies below 0, `opposite` if above, `not told`, or `not finished`.
    """
    gap = contrast(confirmed(BDPO), confirmed(DPO)).of(results, GAP)
    if gap.count < len(SEEDS):
        return "not finished", gap
    return "confirmed" if _wholly(gap, -1) else "opposite" if _wholly(gap, 1) else "not told", gap


def default_temperature(results: Results) -> str:
    """Return whether `tau: auto` stays the default: `stays`, `0.25`, or `not finished`.

    It stays unless B-DPO with τ 0.25 is better than with `auto` in the gap or the refusals of harmful prompts, by an
    interval that excludes 0.
    """

    def better(measure: Measure) -> bool:
        return _wholly(compared[measure.name], measure.better)

    compared = {measure.name: against(SHARP, BDPO).of(results, measure) for measure in _DECIDING}
    if min(one.count for one in compared.values()) < len(SEEDS):
        return "not finished"
    return "0.25" if any(map(better, _DECIDING)) else "stays"
