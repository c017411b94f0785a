"""Judges: what an answer is taken for. All speak through `judge.Judge`."""
