"""Preference data, from files to batches: records → rows → token ids → pair tables → batches."""
