"""The table that closes a run: what changed, and where everything was written."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

_ZERO = 5e-4
_HELD_OUT = (
    ("held-out preference accuracy", "held_out/accuracy", "{:.1%}"),
    ("held-out margin", "held_out/margin", "{:+.3f}"),
    ("margin gap, train − held-out", "gap/margin", "{:+.3f}"),
    ("accuracy gap, train − held-out", "gap/accuracy", "{:+.1%}"),
    ("drift of the chosen, nats", "held_out/drift_chosen", "{:+.2f}"),
    ("drift of the rejected, nats", "held_out/drift_rejected", "{:+.2f}"),
)


def summary_table(
    evaluations: Mapping[int, Mapping[str, float]],
    final_step: int,
    rates_before: Mapping[str, float],
    rates_after: Mapping[str, float],
) -> Table:
    """Before → after, one measure a row; a dash where there is no measurement.

    Args:
        evaluations: validation results by optimiser step.
        final_step: the last optimiser step of the run.
        rates_before: refusal rates before training, by name.
        rates_after: after it.
    """
    table = Table(title="What changed", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = evaluations.get(0, {}), evaluations.get(final_step, {})
    for label, name, form in _HELD_OUT:
        if name in before or name in after:
            table.add_row(label, _cell(before, name, form), _cell(after, name, form))
    for name in dict.fromkeys([*rates_before, *rates_after]):
        table.add_row(name, _cell(rates_before, name, "{:.1%}"), _cell(rates_after, name, "{:.1%}"))
    return table


def _cell(values: Mapping[str, float], name: str, form: str) -> str:
    if name not in values:
        return "–"
    value = values[name]
    # Rounding of nothing is no "-0.000".
    return form.format(value if abs(value) >= _ZERO else 0.0)
