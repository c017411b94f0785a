"""Tables of the study's page: numbers with their intervals, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.study.report.results import OUTCOMES, Cell, Measure, Results
from benchmarks.study.report.statistics import Interval, holm, interval, paired

SIGNIFICANT = 0.05
MISSING = "–"


@dataclass(frozen=True)
class Group:
    """Cells that differ only in their seed.

    Attributes:
        label: label in the first column.
        section: section of the study.
        method: name of the method.
        variant: name of the variant.
    """

    label: str
    section: str
    method: str
    variant: str = ""

    def series(self, results: Results, measure: Measure) -> dict[int, float]:
        """Return finite values by seed."""
        return results.series(measure, self.section, self.method, self.variant)

    def cells(self, results: Results) -> list[Cell]:
        """Return all cells, including failed ones."""
        return results.pick(self.section, self.method, self.variant)

    def name(self, results: Results) -> str:
        """Return the label, with the number of seeds if some have failed."""
        cells = self.cells(results)
        failed = sum("failed" in cell for cell in cells)
        return f"{self.label} ({failed} of {len(cells)} seeds failed)" if failed else self.label


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with its first column left-aligned and the others right-aligned."""
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def number(value: float, digits: int, sign: bool = False) -> str:
    """Format `value` with a true minus sign, and without one before zero."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        return f"{0:.{digits}f}"
    return text.replace("-", "−")


def mean_text(found: Interval, digits: int) -> str:
    """Format a mean as `41.3 ± 2.1`; a single seed is marked, and a dash takes the place of a missing interval."""
    if not found.count:
        return MISSING
    if found.count == 1:
        return f"{number(found.mean, digits)} (1 seed)"
    half = MISSING if math.isnan(found.half) else number(found.half, digits)
    return f"{number(found.mean, digits)} ± {half}"


def difference_text(found: Interval, digits: int, adjusted: float = math.nan) -> str:
    """Format a difference as `−3.2 [−5.0, −1.4]`, bold if Holm's adjusted p is below 0.05.

    A single seed is marked, and a dash takes the place of a missing interval.
    """
    if not found.count:
        return MISSING
    mean = number(found.mean, digits, sign=True)
    if found.count == 1:
        return f"{mean} (1 seed)"
    ends = MISSING if math.isnan(found.half) else f"{number(found.low, digits)}, {number(found.high, digits)}"
    text = f"{mean} [{ends}]"
    return f"**{text}**" if adjusted < SIGNIFICANT else text


def means(results: Results, groups: Sequence[Group], measures: Sequence[Measure]) -> str:
    """Return a row for each group: means over seeds ± half of the 95 % interval."""
    rows = []
    for group in groups:
        row = [group.name(results)]
        for measure in measures:
            found = interval(list(group.series(results, measure).values()))
            if group.method == "reference":
                row.append(number(found.mean, measure.digits) if found.count else MISSING)
            else:
                row.append(mean_text(found, measure.digits))
        rows.append(row)
    return table(["", *(measure.head for measure in measures)], rows)


@dataclass(frozen=True)
class Contrast:
    """Two groups to compare, seed by seed.

    Attributes:
        label: label in the first column.
        first: group from which the other is subtracted.
        second: group that is subtracted.
    """

    label: str
    first: Group
    second: Group

    def of(self, results: Results, measure: Measure) -> Interval:
        """Return first − second."""
        return paired(self.first.series(results, measure), self.second.series(results, measure))


def contrast(first: Group, second: Group) -> Contrast:
    """Return the contrast first − second, with that label."""
    return Contrast(f"{first.label} − {second.label}", first, second)


@dataclass(frozen=True)
class Differences:
    """A table of differences, a family for Holm's correction.

    Attributes:
        text: the table.
        tests: number of its differences that have a p.
        signs: significant differences after the correction, as (row, column, mean).
    """

    text: str
    tests: int
    signs: list[tuple[str, Measure, float]]

    @property
    def said(self) -> str:
        """Describe in sentences which differences remain after the correction."""
        if not self.tests:
            return "No difference here has the two seeds that an interval needs."
        if not self.signs:
            return f"After Holm's correction for the {self.tests} differences of this table none differs from 0."
        listed = "; ".join(
            f"{row}: {', '.join(f'{m.name} {_word(m, mean)}' for r, m, mean in self.signs if r == row)}"
            for row in dict.fromkeys(row for row, _, _ in self.signs)
        )
        return (
            f"After Holm's correction for the {self.tests} differences of this table {len(self.signs)} "
            f"{'differs' if len(self.signs) == 1 else 'differ'} from 0 (bold). {listed}."
        )


def differences(results: Results, contrasts: Sequence[Contrast], measures: Sequence[Measure] = OUTCOMES) -> Differences:
    """Return a row for each contrast: paired differences with 95 % intervals, corrected together."""
    found = [[each.of(results, measure) for measure in measures] for each in contrasts]
    adjusted = holm([one.p for row in found for one in row])
    rows, signs = [], []
    most = max((one.count for row in found for one in row), default=0)
    for i, (each, row) in enumerate(zip(contrasts, found, strict=True)):
        texts = []
        for j, (measure, one) in enumerate(zip(measures, row, strict=True)):
            p = adjusted[i * len(measures) + j]
            texts.append(difference_text(one, measure.digits, p))
            if p < SIGNIFICANT:
                signs.append((each.label, measure, one.mean))
        # Fewer seeds than in another row: some failed, or were not run.
        seeds = max(one.count for one in row)
        rows.append([f"{each.label} ({seeds} seeds)" if 1 < seeds < most else each.label, *texts])
    tests = sum(not math.isnan(p) for p in adjusted)
    return Differences(table(["", *(measure.head for measure in measures)], rows), tests, signs)


def _word(measure: Measure, mean: float) -> str:
    if not measure.better:
        return "up" if mean > 0 else "down"
    return "better" if mean * measure.better > 0 else "worse"
