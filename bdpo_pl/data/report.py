"""Report of what loading a data source kept, changed and dropped; printed before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from bdpo_pl.data.chat_template import PINNED_DATE
from bdpo_pl.data.consistency import contradictions
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PairTokenizer

DUPLICATE = "duplicate of an earlier pair"
"""Reason for leaving out a pair that repeats one of its own source."""
DUPLICATE_IN_SOURCES = "duplicate of a pair in an earlier source"
"""Reason for leaving out a pair that repeats one of another source."""
LABELS_DIFFER = "duplicates left out whose weight or safety labels are not those of the first"
"""Note about such pairs; of each, the first is used."""

_EXAMPLES = 3
_ALIKE = 0.25
_THOUGHTS = {"train": "trained on", "mask": "read, not trained on", "strip": "taken out"}


@dataclass
class DataReport:
    """Counts of one source, in the order in which they arose.

    Attributes:
        name: name of the split, for example `train`.
        source: file or dataset.
        read: number of rows read.
        kept: number of pairs used.
        dropped: places of the dropped rows, by reason.
        notes: counts of what was changed or noticed but not dropped.
        files_left_out: unread files in the source's folder.
        templated: number of rows rendered with the chat template.
        label: name of the held-out set, if it has one.
        unit: name of what is kept, pairs or single answers.
        columns: names of the source's columns, if options rename or ignore some.
    """

    name: str
    source: str
    read: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    files_left_out: list[str] = field(default_factory=list)
    templated: int = 0
    label: str = ""
    unit: str = "pairs"
    columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # No field: it is not among the counts that a report is written with.
        self._described: set[str] = set()

    def drop(self, reason: str, place: str) -> None:
        """Count one dropped row."""
        self.dropped.setdefault(reason, []).append(place)

    def note(self, what: str, count: int) -> None:
        """Count something worth knowing; a zero is not reported."""
        if count:
            self.notes[what] = f"{count:,}"

    @property
    def title(self) -> str:
        """Name of the split, with the name of the held-out set."""
        return f"{self.name.partition('/')[0]} ({self.label})" if self.label else self.name

    @property
    def num_dropped(self) -> int:
        """Number of dropped rows, for any reason."""
        return sum(len(places) for places in self.dropped.values())

    def unread(self, name: str) -> None:
        """Count a file in the source's folder that is not read."""
        self.files_left_out.append(name)
        shown = ", ".join(sorted(self.files_left_out)[:_EXAMPLES]) + (
            ", …" if len(self.files_left_out) > _EXAMPLES else ""
        )
        self.notes["files in the folder that are not read"] = f"{len(self.files_left_out):,} ({shown})"

    def read_as(self, tokenizer: PairTokenizer) -> None:
        """Note how the rows were read."""
        read = tokenizer.read_as
        encoder = tokenizer.encoder
        self.templated = read.templated
        self.note("rendered with the chat template", read.templated)
        self.note("of these, HH-RLHF dialogues read as turns (data.dialogues)", read.dialogues)
        self.note("read as plain text, no chat template", read.plain)
        for what, count in read.counts.items():
            if what == "responses with thoughts":
                what = f"responses with thoughts: {_THOUGHTS[tokenizer.thoughts]} (data.thoughts={tokenizer.thoughts})"
            self.note(what, count)
        for added in sorted(read.added):
            self.notes["put before answers by the template, read but not trained on"] = repr(added)
        if read.templated and encoder.template.writes_date:
            date = encoder.template.kwargs.get("date_string") or f"{PINNED_DATE:%d %b %Y}"
            self.notes["date that the template writes, pinned (chat_template_kwargs.date_string)"] = str(date)

    def describe(self, table: PairTable, contradicted: int | None = None) -> None:
        """Count `table`, the pairs that are used, and note their properties instead of those noted before.

        Args:
            table: pairs or single answers.
            contradicted: number of them that another one contradicts. Default: those that one of `table` does.
        """
        self.kept = len(table)
        for what in self._described:
            self.notes.pop(what, None)
        others = set(self.notes)
        self.lengths(table)
        self.weights(table)
        if table.desirable is not None:
            self.unit = "answers"
            self.note("good answers", int(table.desirable.sum()))
            self.note("bad answers", int((~table.desirable).sum()))
        if contradicted is None:
            contradicted = len(contradictions(table).all())
        said = "pairs that another pair contradicts" if table.desirable is None else "answers that have both labels"
        self.note(said, contradicted)
        self._described = self.notes.keys() - others

    def lengths(self, table: PairTable) -> None:
        """Note the token lengths of the kept pairs, and the share of responses with the same beginning."""
        responses = table.trained_lengths.reshape(-1)
        for what, values in (("prompt tokens", table.prompt_lengths), ("response tokens", responses)):
            if len(values):
                self.notes[f"{what}: median / 95 % / max"] = (
                    f"{np.median(values):.0f} / {np.percentile(values, 95):.0f} / {values.max()}"
                )
        share, size = alike(table)
        if share >= _ALIKE and len(table) > 1:
            self.notes[f"responses that begin with the same {size} tokens"] = f"{share:.0%}"

    def weights(self, table: PairTable) -> None:
        """Note the factors of the pairs' losses, where the data gives them."""
        if table.weights is None or not len(table):
            return
        smallest, mean, largest = table.weights.min(), table.weights.mean(), table.weights.max()
        self.notes["weights of pairs: smallest / mean / largest"] = f"{smallest:.3g} / {mean:.3g} / {largest:.3g}"
        self.note("pairs of weight 0, which training does not learn from", int((table.weights == 0).sum()))


def alike(table: PairTable, size: int = 4) -> tuple[float, int]:
    """Return the share of responses that begin with the most common first `size` trained tokens, and `size`."""
    if not len(table):
        return 0.0, size
    cuts = table.starts[:-1] + table.prompt_lengths
    middles = cuts + table.chosen_lengths
    starts, stops = np.concatenate([cuts, middles]), np.concatenate([middles, table.starts[1:]])
    said = np.arange(len(table.tokens)) if table.trained is None else np.flatnonzero(table.trained)
    first = np.searchsorted(said, starts)[:, None] + np.arange(size)
    inside = (first < len(said)) & (said[np.minimum(first, len(said) - 1)] < stops[:, None])
    beginnings = np.where(inside, table.tokens[said[np.minimum(first, len(said) - 1)]], -1)
    _, counts = np.unique(beginnings, axis=0, return_counts=True)
    return float(counts.max() / len(beginnings)), size


def report_table(reports: Sequence[DataReport]) -> Table:
    """Return the reports as a rich table with one block per split."""
    table = Table(title="Data", title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column(overflow="fold", style="dim")
    for report in reports:
        table.add_section()
        table.add_row(
            f"[bold]{report.title}[/bold]",
            f"{report.kept:,} {report.unit}",
            f"of {report.read:,} rows in {report.source}",
        )
        for reason, places in report.dropped.items():
            examples = "; ".join(place.removeprefix(f"{report.source}, ") for place in places[:_EXAMPLES])
            more = ", …" if len(places) > _EXAMPLES else ""
            table.add_row(f"  dropped: {reason}", f"{len(places):,}", examples + more)
        for what, value in report.notes.items():
            table.add_row(f"  {what}", value, "")
    return table
