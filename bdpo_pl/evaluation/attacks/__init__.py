"""Attacks on a model's refusals. Each turns the prompts of a suite into new ones, within a stated budget of steps."""
