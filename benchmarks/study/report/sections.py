# ruff: noqa: E501 - lines of a page, which wraps them itself
"""Sections of the study's page: tables, and the sentences that follow from them by rule."""

from __future__ import annotations

import math
from collections import Counter

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
from benchmarks.study.run.plan import BDPO, DPO, DPO_BW, DPO_SF, HALVES

_ORDER = [method.name for method in plan.METHODS]
NOT_RUN = "Not in the records."
"""What a section says that has no cells."""


def main_table(results: Results, figures: str) -> str:
    """Methods by outcomes, laid out as the paper's main table, and each against DPO."""
    lines = ["## The methods"]
    names = results.methods("final", _ORDER)
    if not names:
        return "\n\n".join([*lines, NOT_RUN])
    groups = [Group("reference", "final", "reference")] if results.pick("final", "reference") else []
    groups += [Group(name, "final", name) for name in names]
    lines += [
        "In percent. The reference is not trained, so it has no seeds and no interval.",
        means(results, groups, OUTCOMES),
    ]
    lines.append(_figure("methods.svg", figures, results))
    against = [contrast(Group(name, "final", name), groups_of(DPO.name)) for name in names if name != DPO.name]
    if DPO.name in names and against:
        found = differences(results, [Contrast(each.first.label, each.first, each.second) for each in against])
        lines += ["Minus DPO, in points, paired by seed:", found.text, found.said]
    lines.append(paper.main_rows())
    framings = results.framings()
    measures = [Measure(name, attack(FRAMED + name), better=-1) for name in framings]
    lines += ["Attack success in each unseen framing, in percent:", means(results, groups, measures)]
    lines.append("### Overfitting, and what answers are")
    lines.append(
        "Margins are in one unit for every loss, and without β: the log-probability that the policy has and the reference has "
        "not, summed over the response, of the chosen minus the rejected. It is 0 before training for every method, also for "
        "those that read no reference. The gap is the margin on training pairs minus that on held-out pairs. It grows with how "
        "far a policy has moved, so its share of the training margin stands beside it."
    )
    apart = (TRAIN_MARGIN, HELD_OUT_MARGIN, GAP, GAP_SHARE, OTHER)
    trained = [group for group in groups if group.method != "reference"]
    lines.append(means(results, trained, apart))
    if DPO.name in names and against:
        found = differences(
            results, [Contrast(each.first.label, each.first, each.second) for each in against], (GAP, GAP_SHARE, OTHER)
        )
        lines += ["Minus DPO, in nats and points:", found.text, found.said]
    lines.append(
        "An answer of no known kind is no text that the world's writers could write. On a harmful prompt the phrase judge takes "
        "it for a success of the attack, unless it holds a phrase of refusal."
    )
    lines.append(
        "Time: wall clock of training alone, scores of the reference being cached by whichever cell came first, on a machine "
        "with other cells beside it; and processor time of the whole cell, evaluation included."
    )
    lines.append(means(results, trained, (SECONDS, CPU_SECONDS)))
    return joined(lines)


def ablation(results: Results) -> str:
    """The paper's ablation, its own rows beside it, and again with another reference."""
    lines = ["## Ablation"]
    names = [name for name in (*paper.ABLATION, "B-DPO, s by norm") if results.pick("final", name)]
    if not names:
        return joined([*lines, NOT_RUN])
    lines.append(
        "DPO+SF is DPO at twice its β, and DPO+BW is B-DPO (s = 2) at half its β: the loss is the same function. So DPO and "
        "DPO+SF, and DPO+BW and B-DPO, differ in nothing but the values of β that were tried for them, by a factor of two; what "
        "is compared between the two couples is balance."
    )
    measures = (REFUSAL, REFUSAL_CATEGORIES, FRAMED_ATTACKS, OVER_REFUSAL, ABILITY, GAP)
    lines += ["Here, in percent (gap in nats):", means(results, [groups_of(name) for name in names], measures)]
    lines.append(paper.ablation_rows())
    found = differences(results, _ablation_contrasts(results, "final"), measures)
    lines += ["Differences here, in points (gap in nats), paired by seed:", found.text, found.said]
    lines.append("### Again with another reference")
    again = results.methods("replication", _ORDER)
    if not again:
        return joined([*lines, NOT_RUN])
    lines.append(
        "Another seed of weights, of examples, and of which acts and templates are frequent; settings chosen with the first."
    )
    groups = [Group("reference", "replication", "reference")] if results.pick("replication", "reference") else []
    lines.append(means(results, groups + [Group(name, "replication", name) for name in again], measures))
    found = differences(results, _ablation_contrasts(results, "replication"), measures)
    lines += [found.text, found.said]
    return joined(lines)


def imbalance(results: Results, figures: str) -> str:
    """The paper's two observations."""
    lines = ["## Is comprehension imbalanced, and does that matter?"]
    lines.append("### How unequally the reference comprehends the two responses")
    groups = imbalance_groups(results)
    if groups:
        lines.append(
            "Comprehension of the chosen minus that of the rejected (pmi), in nats per token, over the pairs of a run. A pair is "
            f"strongly re-weighted where one weight is at least {STRONG_RATIO:g} times the other."
        )
        measures = [
            Measure(name, lambda cell, key=key: cell["imbalance"][key], percent=False, digits=3)
            for name, key in (("mean", "mean"), ("mean size", "mean_abs"), ("5 %", "q5"), ("95 %", "q95"))
        ]
        better = Measure("chosen better, %", lambda cell: cell["imbalance"]["chosen_better"])
        strong = [
            Measure(f"strong at τ {tau:g}, %", lambda cell, tau=tau: cell["imbalance"][f"strong_at_tau_{tau:g}"])
            for tau in TAUS
        ]
        lines += [means(results, groups, [*measures, better, *strong]), _figure("imbalance.svg", figures, results)]
        share = interval(list(groups[0].series(results, better).values()))
        side = "cannot be told from half" if share.low <= 50 <= share.high else "is not half"
        if math.isfinite(share.half):
            lines.append(
                f"Of {groups[0].label}, {mean_text(interval(list(groups[0].series(results, strong[0]).values())), 1)} % would be "
                f"strongly re-weighted at τ {TAUS[0]:g}. The share whose chosen response is the better comprehended {side}. "
                "That there is imbalance at all is no finding, as the world is made with it; its size and side are."
            )
    else:
        lines.append(NOT_RUN)
    lines.append("### DPO on the more and on the less balanced half")
    if not results.pick("imbalance"):
        return joined([*lines, NOT_RUN])
    lines.append(
        "DPO as it was chosen, on half of the pairs: the less imbalanced half by |chosen − rejected|, the more imbalanced, or any. "
        "Each half has half of every kind of prompt; all three have as many pairs and steps."
    )
    outcomes = (*OUTCOMES, GAP)
    groups = [Group(half, "imbalance", DPO.name, half) for half in HALVES]
    lines.append(means(results, groups, outcomes))
    found = differences(results, halves_contrasts(), outcomes)
    lines += ["Differences in points (gap in nats), paired by seed:", found.text, found.said]
    lines.append(_figure("halves.svg", figures, results))
    return joined(lines)


def curves(results: Results, figures: str) -> str:
    """Safety and gap on the way."""
    lines = ["## On the way"]
    groups = curve_groups(results)
    if not any(cell.get("curve") for cell in results.pick("curves")):
        return joined([*lines, NOT_RUN])
    lines.append(
        f"Settings as chosen, but for {plan.CURVE_EPOCHS} epochs, so that overfitting has time to show. Bands are 95 % t intervals. "
        "Where DPO and B-DPO have chosen different learning rates, their curves differ for that too: DPO with the settings of "
        "B-DPO differs from it in balance alone."
    )
    lines.append(_figure("curves.svg", figures, results))
    rows = []
    for group in groups:
        found = {measure.name: curve(results, group, measure) for measure in CHIEF}
        for step in found[REFUSAL.name][0]:
            row = [group.label, str(step)]
            for measure in CHIEF:
                steps, values = found[measure.name]
                row.append(mean_text(values[steps.index(step)], measure.digits) if step in steps else "–")
            rows.append(row)
    lines.append(table(["method", "step", *(measure.head for measure in CHIEF)], rows))
    balanced = [group for group in groups if group.method == BDPO.name]
    others = [group for group in groups if group.method == DPO.name]
    if balanced and others:
        last = [contrast(balanced[0], other) for other in others]
        at_end = differences(results, last, (*OUTCOMES, GAP, GAP_SHARE))
        lines += ["At the end, in points (gap in nats), paired by seed:", at_end.text, at_end.said]
    return joined(lines)


def sensitivity(results: Results, figures: str) -> str:
    """What B-DPO's choices are worth."""
    lines = ["## What if B-DPO had other settings"]
    contrasts = sensitivity_contrasts(results)
    if not contrasts:
        return joined([*lines, NOT_RUN])
    lines.append(
        "One thing changed at a time from what B-DPO has chosen, the same seeds; minus the chosen setting, in points (gap in nats)."
    )
    found = differences(results, contrasts, (*OUTCOMES, GAP))
    return joined([*lines, found.text, found.said, _figure("sensitivity.svg", figures, results)])


def choices(results: Results) -> str:
    """What tuning has tried and chosen."""
    lines = ["## What was tried, and what was chosen"]
    if not results.pick("tuning"):
        return joined([*lines, NOT_RUN])
    half, seeds = error(results)
    if math.isnan(half):
        sure = "A trial has one seed, so no interval"
    else:
        sure = f"A score is a mean of {seeds} seeds, ± {half:.1f} points (95 %, variance pooled over all trials)"
    lines += [
        f"Scores are in percent, less is better. {sure}: a choice among trials that lie close is partly chance, alike for every method.",
        chosen_table(results),
        "All trials, by learning rate and epochs; chosen ones are bold:",
        trials_table(results),
    ]
    return joined(lines)


def summary(results: Results) -> str:
    """How many differences hold, do not hold and cannot be told."""
    counted = Counter(said for *_, said in verdicts(results, CHECKS))
    total = counted.total() - counted[ABSENT]
    if not total:
        return "The records decide none of the paper's claims."
    hold, do = "holds" if counted[HOLDS] == 1 else "hold", "does" if counted[FAILS] == 1 else "do"
    return (
        f"The paper's claims come to {total} differences that the records have: {counted[HOLDS]} {hold} here, {counted[FAILS]} {do} "
        f"not, and of {counted[UNKNOWN]} it cannot be told."
        + (f" {counted[ABSENT]} more are not in the records." if counted[ABSENT] else "")
    )


def claims(results: Results) -> str:
    """The paper's claims, each with its verdict."""
    rule = (
        "The rule: a claim *holds here* if the whole 95 % interval lies on its side, *does not hold here* if it lies on the "
        "other, and *cannot be told* else; nor can it where the interval excludes the bound but Holm's correction for all "
        "differences of this table brings p to 0.05 or more. That nothing can be told is no sign that there is nothing: the "
        f"interval says how large a difference may still be. A cost of less than {TOLERANCE:g} points counts as none. Refusal "
        "and attack success are in points; the intervals are not corrected."
    )
    return joined(["## The paper's claims, one by one", rule, summary(results), claims_table(results)])


def groups_of(method: str) -> Group:
    """A method's cells on the test."""
    return Group(method, "final", method)


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


def _figure(name: str, folder: str, results: Results) -> str:
    caption, has, _ = FIGURES[name]
    return f"![{caption}]({folder}/{name})\n\n*{caption}.*" if has(results) else ""


def joined(lines: list[str]) -> str:
    """Paragraphs, without those that have nothing to say."""
    return "\n\n".join(line for line in lines if line)
