"""What loading a data source kept, changed and dropped; printed before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

_EXAMPLES = 3


@dataclass
class DataReport:
    """Counts of one source, in the order things happened to its rows.

    Attributes:
        name: which split, as in `train`.
        source: file or dataset.
        read: rows read.
        kept: pairs that will be used.
        dropped: reason → places of the rows dropped for it.
        notes: counts of what was changed or noticed but not dropped.
    """

    name: str
    source: str
    read: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        """Count one dropped row."""
        self.dropped.setdefault(reason, []).append(place)

    def note(self, what: str, count: int) -> None:
        """Count something worth knowing; a zero is not worth a line."""
        if count:
            self.notes[what] = f"{count:,}"

    @property
    def num_dropped(self) -> int:
        """Rows dropped, for whatever reason."""
        return sum(len(places) for places in self.dropped.values())

    def lengths(self, prompt: np.ndarray, response: np.ndarray) -> None:
        """Note the token lengths of the kept pairs."""
        for what, values in (("prompt tokens", prompt), ("response tokens", response)):
            if len(values):
                self.notes[f"{what}: median / 95 % / max"] = (
                    f"{np.median(values):.0f} / {np.percentile(values, 95):.0f} / {values.max()}"
                )


def report_table(reports: Sequence[DataReport]) -> Table:
    """The reports as a rich table, one block a split."""
    table = Table(title="Data", title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column(overflow="fold", style="dim")
    for report in reports:
        table.add_section()
        table.add_row(
            f"[bold]{report.name}[/bold]", f"{report.kept:,} pairs", f"of {report.read:,} rows in {report.source}"
        )
        for reason, places in report.dropped.items():
            examples = "; ".join(place.removeprefix(f"{report.source}, ") for place in places[:_EXAMPLES])
            more = ", …" if len(places) > _EXAMPLES else ""
            table.add_row(f"  dropped: {reason}", f"{len(places):,}", examples + more)
        for what, value in report.notes.items():
            table.add_row(f"  {what}", value, "")
    return table
