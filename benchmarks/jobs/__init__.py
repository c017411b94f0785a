"""Whole alignment jobs, and their scoring passes, beside TRL."""
