"""Findings that a reader should act on, worst first; every threshold is defined here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from bdpo_pl.data.held_out import called
from bdpo_pl.diagnosis.results import Diagnosis, SplitDiagnosis
from bdpo_pl.losses.balanced_dpo import EXTREME_RATIO
from bdpo_pl.reporting import Finding
from bdpo_pl.reporting.format import fixed, general, percent, plural, ratio, signed, whole

MANY_STRONG = 0.10
"""Share of strongly re-weighted pairs from which a notice is given."""
TILTED = 0.05
"""Difference between the mean strengths of the two sides (1 on each side in DPO) from which a notice is given."""
ONE_SIDED_LENGTH = 0.65
"""Share of pairs with the longer response on one side from which a notice is given."""
CORRELATED = 0.30
"""Spearman's correlation from which a notice is given."""
UNEVEN = 1.5
"""Mean absolute imbalance of a category or of held-out pairs, over the training pairs', that leads to a notice."""
LEAST_OF_CATEGORY = 10
"""Number of pairs below which a category is not compared with the whole."""
FEW_PAIRS = 50
SPREADS_APART = 1.5
"""Ratio between τ and the spread of the imbalance, larger over smaller, from which a notice is given."""

_ORDER = ("problem", "notice", "fine")


def find(diagnosis: Diagnosis) -> list[Finding]:
    """Return the findings, problems first."""
    found = [*_data(diagnosis), *_balance(diagnosis), *_length(diagnosis.splits["train"])]
    found += [Finding("notice", note) for note in diagnosis.notes]
    return sorted(found, key=lambda finding: _ORDER.index(finding.level))


def _data(diagnosis: Diagnosis) -> Iterator[Finding]:
    leaks = diagnosis.leaks
    if leaks is None:
        yield Finding("notice", "Nothing is held out.", "Overfitting cannot be measured; set data.held_out.")
    elif leaks.prompts:
        yield Finding(
            "problem",
            f"{_pairs(len(leaks.prompts))} held out from training share a prompt with it.",
            "The gap between training and held-out pairs will look smaller than it is.",
        )
    else:
        yield Finding("fine", "No prompt is both held out and trained on.")
    if leaks is not None and leaks.near_prompts:
        yield Finding(
            "notice",
            f"{_pairs(len(leaks.near_prompts))} held out differ from a training prompt only in case, spacing or "
            "punctuation.",
        )
    if leaks is not None and leaks.chosen:
        yield Finding(
            "notice",
            f"{_pairs(leaks.chosen)} of {whole(leaks.pairs)} held out have a chosen response that training has too.",
            "Held-out accuracy there can come from memory.",
        )
    for name, split in diagnosis.splits.items():
        yield from _pairs_of(name, split)


def _pairs_of(name: str, split: SplitDiagnosis) -> Iterator[Finding]:
    if split.overall.pairs < FEW_PAIRS:
        yield Finding(
            "notice", f"{_named(name)}: only {_pairs(split.overall.pairs)}.", "Shares and means of so few say little."
        )
    if split.swapped:
        yield Finding(
            "problem",
            f"{_named(name)}: {_pairs(len(split.swapped))} contradict another, with the same prompt and swapped sides.",
            "They cancel each other; decide which is right and remove the others.",
        )
    if split.conflicting:
        yield Finding(
            "notice",
            f"{_named(name)}: {_pairs(len(split.conflicting))} prefer a response that another pair of the same prompt "
            "rejects, or the reverse.",
            "A ranking of several responses looks like this too.",
        )
    if not split.swapped and not split.conflicting:
        yield Finding("fine", f"{_named(name)}: no pair contradicts another.")
    if split.duplicates:
        done = "were left out on loading" if split.duplicates_dropped else "are kept, and count more than once"
        yield Finding(
            "fine" if split.duplicates_dropped else "notice",
            f"{_named(name)}: {_pairs(len(split.duplicates))} repeat an earlier one; they {done}.",
        )


def _balance(diagnosis: Diagnosis) -> Iterator[Finding]:
    overall, ratios = diagnosis.splits["train"].overall, diagnosis.splits["train"].weight_ratio
    detail = (
        f"One response has at least {general(diagnosis.strong_ratio)} times the weight of the other. "
        f"Half the pairs stay within {ratio(ratios['median'])} times, 95 % within {ratio(ratios['p95'])}."
    )
    yield from _temperature(diagnosis)
    if diagnosis.weights_of:
        detail += f" The loss of this configuration applies no weights: these are what {diagnosis.weights_of} would do."
    yield Finding(
        "notice" if overall.strong >= MANY_STRONG else "fine",
        f"{percent(overall.strong)} of the {whole(overall.pairs)} training pairs would be re-weighted strongly.",
        detail,
    )
    mean = overall.imbalance
    if mean.bounded and not mean.low <= 0.0 <= mean.high:
        side = "chosen" if mean.value > 0 else "rejected"
        amount = f"{fixed(abs(mean.value), 2)} {diagnosis.unit}".strip()
        tilt = abs(overall.strength_chosen - overall.strength_rejected)
        yield Finding(
            "notice" if tilt >= TILTED else "fine",
            f"The {side} responses are the better comprehended ones, by {amount} on average.",
            f"Of DPO's strength B-DPO gives {fixed(overall.strength_chosen, 2)} to the chosen and "
            f"{fixed(overall.strength_rejected, 2)} to the rejected ones.",
        )
    elif mean.bounded:
        yield Finding("fine", "Neither side is the better comprehended one on average.")
    uneven = [
        g for g in diagnosis.splits["train"].categories
        if g.size >= UNEVEN * overall.size > 0 and LEAST_OF_CATEGORY <= g.pairs < overall.pairs
    ]  # fmt: skip
    if uneven:
        named = ", ".join(f"{g.name} ({fixed(g.size / overall.size, 1)}×)" for g in uneven[:5])
        yield Finding(
            "notice",
            f"Categories much more imbalanced than the whole: {named}{', …' if len(uneven) > 5 else ''}.",
            "Look there first after training.",
        )
    if "held_out" in diagnosis.splits and diagnosis.splits["held_out"].overall.size >= UNEVEN * overall.size > 0:
        size = diagnosis.splits["held_out"].overall.size
        yield Finding(
            "notice",
            f"Held-out pairs are {fixed(size / overall.size, 1)} times as imbalanced as training pairs.",
            "They differ in kind from the training pairs, which alone can cause a gap after training.",
        )


def _temperature(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Check τ against the spread of the imbalance, at which the typical pair has weights of about 2 to 1."""
    tau, suggested = diagnosis.tau, diagnosis.suggested_tau
    spread = diagnosis.splits["train"].overall.spread
    if tau is None or suggested is None or spread is None:
        return
    now = next(row for row in diagnosis.temperatures if row.tau == tau)
    then = next(row for row in diagnosis.temperatures if row.tau == suggested)
    bound = diagnosis.max_weight_ratio
    suits, within = spread, ratio(then.p95)
    advised: float | None = then.tau
    fine = f"τ = {general(tau)} is about the spread of the imbalance, {general(spread, 2)}."
    if then.p95 > EXTREME_RATIO:
        # Even at the spread weights are extreme, as most pairs lean the same way or a few are far out.
        # A ratio at the loss's bound does not show how far out they are.
        exact = [row for row in diagnosis.temperatures if bound is None or row.p95 < bound]
        if exact:
            row = then if then in exact else exact[-1]
            suits = advised = rounded_up(row.tau * math.log(row.p95) / math.log(EXTREME_RATIO))
        else:
            advised = None
        within = ratio(EXTREME_RATIO)
        fine = f"At τ = {general(tau)} 95 % of the pairs have weights within {ratio(now.p95)} times of each other."
    if now.p95 <= EXTREME_RATIO and 1 / SPREADS_APART <= tau / suits <= SPREADS_APART:
        yield Finding("fine", fine)
        return
    sharp = now.p95 > EXTREME_RATIO or tau < suits
    than = "more than" if bound is None else "at least"
    consequence = (
        f"One response gets {than} {ratio(now.median)} times the other's weight in half of the pairs, {than} "
        f"{ratio(now.p95)} times in 5 %"
        + (", where the other is hardly trained." if bound is None else f"; the loss allows {ratio(bound)}.")
        if sharp
        else "Balance weights hardly differ, and B-DPO is nearly DPO."
    )
    advice = "" if advised is None else f"--tau {general(advised)}, at which 95 % stay within {within} times"
    if sharp and bound is None:
        advice += ", or model.loss.max_weight_ratio"
    elif now.p95 > EXTREME_RATIO:
        advice += f"{advice and ', or '}a lower model.loss.max_weight_ratio"
    yield Finding(
        "problem" if now.median > EXTREME_RATIO else "notice",
        f"τ is {general(tau)}, and the spread of the imbalance, which tau auto takes, is {general(spread, 2)}.",
        f"{consequence} {'Milder' if sharp else 'Sharper'}: {advice}.",
    )


def rounded_up(value: float, digits: int = 2) -> float:
    """Round up to some digits, so that a limit which holds at `value` holds at the result."""
    return _rounded(math.ceil, value, digits)


def rounded_down(value: float, digits: int = 2) -> float:
    """Round down to some digits; see `rounded_up`."""
    return _rounded(math.floor, value, digits)


def _rounded(to_whole: Callable[[float], int], value: float, digits: int) -> float:
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{to_whole(value / step) * step:.{digits}g}")


def _length(split: SplitDiagnosis) -> Iterator[Finding]:
    bias = split.length_bias
    for side, share in (("chosen", bias.chosen_longer), ("rejected", bias.rejected_longer)):
        if share >= ONE_SIDED_LENGTH:
            yield Finding(
                "notice",
                f"The {side} response is the longer one in {percent(share, 0)} of the training pairs.",
                f"Mean lengths: chosen {fixed(bias.mean_chosen, 1)}, rejected {fixed(bias.mean_rejected, 1)} tokens. "
                "A model can learn the length instead of the preference.",
            )
            break
    else:
        yield Finding("fine", "Length does not give the preferred side away.")
    if bias.correlation_imbalance is not None and abs(bias.correlation_imbalance) >= CORRELATED:
        yield Finding(
            "notice",
            f"Imbalance goes with the difference in length (Spearman {signed(bias.correlation_imbalance)}).",
            "Part of what the weights see is length.",
        )


def _pairs(count: int) -> str:
    return f"{whole(count)} {plural(count, 'pair')}"


def _named(split: str) -> str:
    return called(split, "Training pairs", "Held-out pairs")
