"""Statistics of verdicts and margins, with intervals."""
