"""The final table of a run: results before and after, the number of pairs, and remarks on its limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from bdpo_pl.errors import first_line
from bdpo_pl.reporting.format import fixed, percent, signed, signed_percent, whole
from bdpo_pl.statistics import Interval, wilson
from bdpo_pl.training.metrics import SHARES
from bdpo_pl.training.single_words import worded

FEW_PAIRS = 50
"""Number of held-out pairs below which a remark says that they are few."""
_ZERO = 5e-4
_BY_DEFINITION = "by definition"
_Form = Callable[[float], str]


def _three(value: float) -> str:
    return signed(value, 3)


_HELD_OUT: tuple[tuple[str, str, _Form], ...] = (
    ("held-out preference accuracy", "held_out/accuracy", percent),
    ("the same by log-prob. per token", "held_out/logp_accuracy", percent),
    ("held-out margin", "held_out/margin", _three),
    ("margin gap, train − held-out", "gap/margin", _three),
    ("accuracy gap, train − held-out", "gap/accuracy", signed_percent),
    ("drift of the chosen, nats", "held_out/drift_chosen", signed),
    ("drift of the rejected, nats", "held_out/drift_rejected", signed),
)
_FURTHER: tuple[tuple[str, str, _Form], ...] = (
    ("preference accuracy", "accuracy", percent),
    ("the same by log-prob. per token", "logp_accuracy", percent),
    ("margin", "margin", _three),
    ("drift of the chosen, nats", "drift_chosen", signed),
    ("drift of the rejected, nats", "drift_rejected", signed),
)
_SHARES = tuple(f"/{name}" for name in SHARES)
# Values of every policy that equals its reference.
_AT_START = {
    "held_out/accuracy": 0.5, "held_out/margin": 0.0, "gap/margin": 0.0, "gap/accuracy": 0.0,
    "held_out/drift_chosen": 0.0, "held_out/drift_rejected": 0.0,
}  # fmt: skip


_JUDGE = "Refusals are recognised by phrases, which do not measure harm. Agreement with people: docs/evaluation.md."


def summary_table(
    evaluations: Mapping[int, Mapping[str, float]],
    final_step: int,
    rates_before: Mapping[str, float],
    rates_after: Mapping[str, float],
    *,
    intervals: Mapping[int, Mapping[str, Interval]] | None = None,
    pairs: int | None = None,
    prompts: Mapping[str, int] | None = None,
    sets: Mapping[str, int] | None = None,
    single: bool = False,
) -> Table:
    """Build the table of measures before and after training, with 95 % intervals; a dash means not measured.

    Args:
        evaluations: validation results by optimiser step.
        final_step: optimiser step of the weights after training: the last one, or that of the exported checkpoint.
        rates_before: refusal rates before training, by name.
        rates_after: refusal rates after training, by name.
        intervals: 95 % intervals of the validation results, by optimiser step.
        pairs: number of held-out pairs.
        prompts: number of prompts of each refusal rate.
        sets: number of pairs of each held-out set by its name, the monitored one first.
        single: true if pairs are single answers with a label.
    """
    table = Table(title="What changed, with 95 % intervals", title_justify="left")
    table.add_column("")
    for column in ("n", "before", "after"):
        table.add_column(column, justify="right")
    counted: Any = {"intervals": intervals, "pairs": pairs, "prompts": prompts, "sets": sets, "single": single}
    rows = summary_rows(evaluations, final_step, rates_before, rates_after, **counted)
    for row in rows:
        table.add_row(*row)
    if rates_before or rates_after:
        table.caption, table.caption_justify = _JUDGE, "left"
    return table


def summary_rows(
    evaluations: Mapping[int, Mapping[str, float]],
    final_step: int,
    rates_before: Mapping[str, float],
    rates_after: Mapping[str, float],
    *,
    intervals: Mapping[int, Mapping[str, Interval]] | None = None,
    pairs: int | None = None,
    prompts: Mapping[str, int] | None = None,
    sets: Mapping[str, int] | None = None,
    single: bool = False,
) -> list[list[str]]:
    """Return the cells of `summary_table`: measure, number, before and after; the arguments are the same."""
    rows = []
    before, after = evaluations.get(0, {}), evaluations.get(final_step, {})
    known = (intervals or {}).get(final_step, {})
    monitored, *others = sets or {"": 0}
    shown = [
        (label.replace("held-out", f"held-out ({monitored})") if monitored else label, name, form, pairs)
        for label, name, form in ((worded(label, single), name, form) for label, name, form in _HELD_OUT)
    ]
    shown += [
        (f"{other}: {worded(label, single)}", f"held_out/{other}/{name}", form, (sets or {})[other])
        for other in others
        for label, name, form in _FURTHER
    ]
    for label, name, form, count in shown:
        if name in before or name in after:
            first = _BY_DEFINITION if _is_by_definition(before, name) else _cell(before, name, form, {}, count)
            rows.append([label, "" if count is None else whole(count), first, _cell(after, name, form, known, count)])
    for name in dict.fromkeys([*rates_before, *rates_after]):
        count = (prompts or {}).get(name)
        cells = (_rate(rates, name, count) for rates in (rates_before, rates_after))
        rows.append([name, "" if count is None else whole(count), *cells])
    return rows


def remarks(
    evaluations: Mapping[int, Mapping[str, float]], pairs: int | None, measures_safety: bool, single: bool = False
) -> list[tuple[str, str]]:
    """Return remarks that a reader of the table needs: (level, sentence).

    Args:
        evaluations: validation results by optimiser step.
        pairs: number of held-out pairs; None: none are held out.
        measures_safety: true if prompts were given to measure refusals.
        single: true if pairs are single answers with a label.
    """
    said = []
    before, unit = evaluations.get(0, {}), "answer" if single else "pair"
    if pairs is None:
        said.append(("notice", f"No {unit} was held out, so overfitting cannot be seen: set data.held_out_fraction."))
    elif pairs < FEW_PAIRS:
        said.append(
            ("warning", f"Only {pairs} held-out {unit}{'s' * (pairs > 1)}: one {unit} more or less moves the accuracy "
             f"by {percent(1 / pairs, 0)}. Conclude nothing from it; raise data.held_out_fraction, or give "
             "data.held_out.")
        )  # fmt: skip
    if _is_by_definition(before, "held_out/accuracy"):
        own = before.get("held_out/logp_accuracy")
        beside = (
            ""
            if own is None
            else f" By its own log-probability per token it prefers the chosen response in {percent(own)} of pairs."
        )
        said.append(
            ("note", "Before training the policy is its reference, so accuracy is 50 % and margins are 0 by "
             f"definition.{beside}")
        )  # fmt: skip
    if not measures_safety:
        said.append(
            ("notice", "No safety prompts were given, so this run does not measure refusals: add --safety.harmful and "
             "--safety.benign, or run bdpo evaluate on both models.")
        )  # fmt: skip
    return said


def measured_pairs(intervals: Mapping[str, Interval], sets: Mapping[str, int]) -> dict[str, int]:
    """Return how many pairs of each held-out set a validation measured: all, or fewer by `trainer.limit_val_batches`.

    Args:
        intervals: intervals of its results by `held_out/name` or `held_out/SET/name`.
        sets: number of pairs of each held-out set by its name, the monitored one first.
    """
    found = {}
    for at, (name, size) in enumerate(sets.items()):
        prefix = f"held_out/{name}/" if at else "held_out/"
        counts = [i.count for key, i in intervals.items() if key.rpartition("/")[0] + "/" == prefix]
        found[name] = max(counts, default=size)
    return found


def not_all_measured(measured: int, pairs: int, unit: str) -> tuple[str, str]:
    """Return the remark about validations that measured a part of the held-out pairs."""
    sentence = f"Validations measured {whole(measured)} of {whole(pairs)} held-out {unit}s: an option of the Trainer "
    return "notice", sentence + "limits them (trainer.limit_val_batches, overfit_batches or fast_dev_run)."


def not_all_trained(share: float, subject: str = "The run") -> tuple[str, str]:
    """Return the remark about the gap of a run, or of other weights, that trained on a `share` of an epoch only."""
    sentence = f"{subject} trained on only {percent(share, 0)} of the training data, but the gap is measured on all, "
    remedy = "which makes it too small. To avoid this, train on a smaller set: --data.train '{source: FILE, limit: N}'."
    return "notice", sentence + remedy


def of_another_step(weights: str, measured: bool) -> tuple[str, str]:
    """Return the remark about a run that exports other weights than its last ones.

    Args:
        weights: description of the exported weights.
        measured: true if all that the table has was measured on them.
    """
    sentence = f"The exported weights are {weights}. The column after is of these, not of the last ones."
    return "notice", sentence if measured else f"{sentence} A dash: this run did not measure it at that step."


def no_step_taken(step: int) -> tuple[str, str]:
    """Return the remark about a run that took no step: it was resumed at its last one, `step`, or has none."""
    if step == 0:
        sentence = "No step was taken, and the policy is as it was: "
        return "warning", sentence + "raise trainer.max_steps, trainer.max_epochs or trainer.limit_train_batches."
    sentence = f"No step was taken: the checkpoint is of step {step}, where this run ends. To train on, raise "
    return "notice", sentence + "trainer.max_steps or trainer.max_epochs."


def none_before(what: str, changed: Iterable[str]) -> tuple[str, str]:
    """Return the remark about a resumed run whose values of `what` before training are of another measurement."""
    sentence = f"No value before training is shown for {what}: before it was resumed, the run measured something else "
    return "notice", f"{sentence}({', '.join(changed)})."


def not_reported(error: Exception) -> tuple[str, str]:
    """Return the remark about a report that could not be written because of `error`."""
    sentence = f"The report was not written ({type(error).__name__}: {first_line(error)}). "
    return "warning", sentence + "All else is: the table is in summary.json, the curves are in metrics.csv."


def remark_line(level: str, sentence: str) -> Text:
    """Format one of `remarks` for a terminal."""
    style = {"warning": "bold red", "notice": "yellow"}.get(level, "dim")
    return Text(f"{level}: ", style) + Text(sentence)


def _is_by_definition(before: Mapping[str, float], name: str) -> bool:
    """Return true if `name` could have no other value before training, because the policy equalled its reference."""
    split, _, metric = name.rpartition("/")
    of = "held_out" if split == "gap" else split
    drifted = [before.get(f"{of}/drift_{side}") for side in ("chosen", "rejected")]
    start = _AT_START.get(name if split == "gap" else f"held_out/{metric}")
    if any(drift is None or abs(drift) > _ZERO for drift in drifted) or name not in before or start is None:
        return False
    return abs(before[name] - start) <= _ZERO


def _cell(
    values: Mapping[str, float], name: str, form: _Form, intervals: Mapping[str, Interval], pairs: int | None
) -> str:
    if name not in values:
        return "–"
    value = values[name]
    text = form(value if abs(value) >= _ZERO else 0.0)
    if name.startswith("held_out/") and name.endswith(_SHARES) and pairs:
        low, high = wilson(value * pairs, pairs)
    elif name in intervals:
        low, high = intervals[name].low, intervals[name].high
    else:
        return text
    return f"{text} [{form(low).rstrip('%')}, {form(high).rstrip('%')}]"


def _rate(rates: Mapping[str, float], name: str, count: int | None) -> str:
    if name not in rates:
        return "–"
    if not count:
        return percent(rates[name])
    low, high = wilson(rates[name] * count, count)
    return f"{percent(rates[name])} [{fixed(100 * low, 1)}, {fixed(100 * high, 1)}]"
