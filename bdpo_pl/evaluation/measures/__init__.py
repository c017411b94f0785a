"""From verdicts and margins to numbers with intervals."""
