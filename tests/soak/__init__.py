"""A search for faults that no test knows yet: `python -m tests.soak --minutes N [--seed S]`."""
