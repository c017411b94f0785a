"""Scores of a frozen model: the scoring pass, its cache, and the reference during a run."""
