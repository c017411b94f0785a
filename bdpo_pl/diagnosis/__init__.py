"""Diagnosis of a model's view of a preference set before it is trained on the set."""
