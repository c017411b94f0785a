"""Judges used for published results, with the prompts of their authors and the same parsing of their answers."""
