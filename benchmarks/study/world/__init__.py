"""The world in which the study trains and tests: its topics, wording and texts, and the judge of its answers."""
