"""Display of a report's findings in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from bdpo_pl.reporting.elements import Finding

_STYLES = {"problem": "bold red", "notice": "yellow", "fine": "green"}


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return a table of the findings, in the given order."""
    table = Table(title="Findings", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        style = _STYLES[finding.level]
        table.add_row(Text(finding.level, style), Text(finding.title) + Text(f" {finding.detail}", "dim"))
    return table
