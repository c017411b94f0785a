"""Suites of prompts: published ones by name, and files of your own."""
