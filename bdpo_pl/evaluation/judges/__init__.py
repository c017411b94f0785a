"""Judges, which classify answers. All of them implement `judge.Judge`."""
