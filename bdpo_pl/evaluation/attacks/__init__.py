"""Attacks on a model's refusals. Each makes new prompts of a suite's, within a stated budget of steps."""
