"""Schemas of preference data, one file each."""
