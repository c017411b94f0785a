"""Numbers and tables for `page.md.j2`, one function per section; None if the records have no cells for it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from benchmarks.study.report import paper
from benchmarks.study.report.choices import chosen_table, error, trials_table
from benchmarks.study.report.claims import ABSENT, CHECKS, FAILS, HOLDS, TOLERANCE, UNKNOWN, claims_table, verdicts
from benchmarks.study.report.figures import (
    FIGURES,
    curve,
    curve_groups,
    halves_contrasts,
    imbalance_groups,
    sensitivity_contrasts,
)
from benchmarks.study.report.results import (
    ABILITY,
    CHIEF,
    CPU_SECONDS,
    FRAMED_ATTACKS,
    GAP,
    GAP_SHARE,
    HELD_OUT_MARGIN,
    OTHER,
    OUTCOMES,
    OVER_REFUSAL,
    REFUSAL,
    REFUSAL_CATEGORIES,
    SECONDS,
    TRAIN_MARGIN,
    Measure,
    Results,
    attack,
)
from benchmarks.study.report.statistics import interval
from benchmarks.study.report.tables import Contrast, Group, contrast, differences, mean_text, means, table
from benchmarks.study.run import plan
from benchmarks.study.run.evaluate import FRAMED
from benchmarks.study.run.imbalance import STRONG_RATIO, TAUS
from benchmarks.study.run.plan import BDPO, CONFIRMED, DPO, DPO_BW, DPO_SF, HALVES, world_name

Facts = dict[str, Any] | None

_ORDER = [method.name for method in plan.METHODS]
_ABLATION = (REFUSAL, REFUSAL_CATEGORIES, FRAMED_ATTACKS, OVER_REFUSAL, ABILITY, GAP)
_CONFIRMATION = (FRAMED_ATTACKS, OVER_REFUSAL, ABILITY, GAP)


def methods(results: Results) -> Facts:
    """Compare methods by outcomes, laid out as the paper's main table, and each against DPO."""
    names = results.methods("final", _ORDER)
    if not names:
        return None
    trained = [_final(name) for name in names]
    groups = ([_final("reference")] if results.pick("final", "reference") else []) + trained
    others = [Contrast(name, _final(name), _final(DPO.name)) for name in names if name != DPO.name]
    against = others if DPO.name in names else []
    framings = [Measure(name, attack(FRAMED + name), better=-1) for name in results.framings()]
    return {
        "means": means(results, groups, OUTCOMES),
        "against": differences(results, against) if against else None,
        "paper": paper.main_table(),
        "framings": means(results, groups, framings),
        "overfitting": means(results, trained, (TRAIN_MARGIN, HELD_OUT_MARGIN, GAP, GAP_SHARE, OTHER)),
        "overfitting_against": differences(results, against, (GAP, GAP_SHARE, OTHER)) if against else None,
        "time": means(results, trained, (SECONDS, CPU_SECONDS)),
    }


def ablation(results: Results) -> Facts:
    """Compare B-DPO with its parts, and again with another reference."""
    names = [name for name in (*paper.ABLATION, "B-DPO, s by norm") if results.pick("final", name)]
    if not names:
        return None
    return {
        "means": means(results, [_final(name) for name in names], _ABLATION),
        "paper": paper.ablation_table(),
        "differences": differences(results, _ablation_contrasts(results, "final"), _ABLATION),
        "again": _replication(results),
    }


def _replication(results: Results) -> Facts:
    names = results.methods("replication", _ORDER)
    if not names:
        return None
    known = ["reference"] if results.pick("replication", "reference") else []
    groups = [Group(name, "replication", name) for name in known + names]
    return {
        "means": means(results, groups, _ABLATION),
        "differences": differences(results, _ablation_contrasts(results, "replication"), _ABLATION),
    }


def _ablation_contrasts(results: Results, section: str) -> list[Contrast]:
    wanted = [
        (DPO_BW.name, DPO.name),
        (DPO_SF.name, DPO.name),
        (BDPO.name, DPO.name),
        (BDPO.name, DPO_BW.name),
        (BDPO.name, DPO_SF.name),
        ("B-DPO, s by norm", BDPO.name),
    ]
    return [
        contrast(Group(first, section, first), Group(second, section, second))
        for first, second in wanted
        if results.pick(section, first) and results.pick(section, second)
    ]


def imbalance(results: Results) -> Facts:
    """Describe how unequally the reference comprehends the two responses of a pair."""
    groups = imbalance_groups(results)
    if not groups:
        return None
    sizes = [
        Measure(name, lambda cell, key=key: cell["imbalance"][key], percent=False, digits=3)
        for name, key in (("mean", "mean"), ("mean size", "mean_abs"), ("5 %", "q5"), ("95 %", "q95"))
    ]
    better = Measure("chosen better, %", lambda cell: cell["imbalance"]["chosen_better"])
    strong = [
        Measure(f"strong at τ {tau:g}, %", lambda cell, tau=tau: cell["imbalance"][f"strong_at_tau_{tau:g}"])
        for tau in TAUS
    ]
    share, strongly = (interval(list(groups[0].series(results, measure).values())) for measure in (better, strong[0]))
    return {
        "ratio": STRONG_RATIO,
        "tau": TAUS[0],
        "means": means(results, groups, [*sizes, better, *strong]),
        "label": groups[0].label,
        "strong": mean_text(strongly, 1) if share.count > 1 else None,
        "half": not (share.low > 50 or share.high < 50),
    }


def halves(results: Results) -> Facts:
    """Compare DPO on the more and on the less balanced half of the pairs."""
    if not results.pick("imbalance"):
        return None
    groups = [Group(half, "imbalance", DPO.name, half) for half in HALVES]
    return {
        "means": means(results, groups, (*OUTCOMES, GAP)),
        "differences": differences(results, halves_contrasts(), (*OUTCOMES, GAP)),
    }


def curves(results: Results) -> Facts:
    """Follow safety and gap over the steps of training."""
    if not any(cell.get("curve") for cell in results.pick("curves")):
        return None
    groups, rows = curve_groups(results), []
    for group in groups:
        found = {measure.name: curve(results, group, measure) for measure in CHIEF}
        for step in found[REFUSAL.name][0]:
            row = [group.label, str(step)]
            for measure in CHIEF:
                steps, values = found[measure.name]
                row.append(mean_text(values[steps.index(step)], measure.digits) if step in steps else "–")
            rows.append(row)
    balanced = [group for group in groups if group.method == BDPO.name]
    last = [contrast(balanced[0], group) for group in groups if balanced and group.method == DPO.name]
    return {
        "epochs": plan.CURVE_EPOCHS,
        "table": table(["method", "step", *(measure.head for measure in CHIEF)], rows),
        "at_end": differences(results, last, (*OUTCOMES, GAP, GAP_SHARE)) if last else None,
    }


def sensitivity(results: Results) -> Any:
    """Compare B-DPO with itself in other settings."""
    contrasts = sensitivity_contrasts(results)
    return differences(results, contrasts, (*OUTCOMES, GAP)) if contrasts else None


def confirmation(results: Results) -> Facts:
    """Compare on pairs and references that no choice has seen: all differences are one family."""
    worlds = confirmation_worlds(results)
    if not worlds:
        return None
    groups = [Group(f"{name}: {method}", "confirmation", method, name) for name in worlds for method in CONFIRMED]
    return {
        "means": means(results, groups, (REFUSAL, *_CONFIRMATION)),
        "differences": differences(results, confirmation_contrasts(results), _CONFIRMATION),
    }


def confirmation_worlds(results: Results) -> list[str]:
    """Return the names of the references with which the main question was repeated, in their order."""
    worlds = sorted({cell["setting"]["world"] for cell in results.pick("confirmation")})
    return [world_name(world) for world in worlds]


def confirmation_contrasts(results: Results) -> list[Contrast]:
    """Return the contrasts of B-DPO with each of the other methods, for each reference."""
    return [
        Contrast(
            f"{world}: {BDPO.name} − {other}",
            Group(BDPO.name, "confirmation", BDPO.name, world),
            Group(other, "confirmation", other, world),
        )
        for world in confirmation_worlds(results)
        for other in CONFIRMED
        if other != BDPO.name
    ]


def choices(results: Results) -> Facts:
    """List what tuning has tried and chosen."""
    if not results.pick("tuning"):
        return None
    half, seeds = error(results)
    return {
        "half": None if math.isnan(half) else half,
        "seeds": seeds,
        "chosen": chosen_table(results),
        "trials": trials_table(results),
    }


def claims(results: Results) -> dict[str, Any]:
    """List the paper's claims with their verdicts, and count these."""
    counted = Counter(said for *_, said in verdicts(results, CHECKS))
    return {
        "counted": {
            "total": counted.total() - counted[ABSENT],
            "holds": counted[HOLDS],
            "fails": counted[FAILS],
            "unknown": counted[UNKNOWN],
            "absent": counted[ABSENT],
        },
        "tolerance": TOLERANCE,
        "table": claims_table(results),
    }


def figure(name: str, folder: str, results: Results) -> str:
    """Return the Markdown of a figure with its caption; empty if the records have no cells for it."""
    caption, has, _ = FIGURES[name]
    return f"![{caption}]({folder}/{name})\n\n*{caption}.*" if has(results) else ""


def _final(method: str) -> Group:
    return Group(method, "final", method)
