"""The world that the study trains and tests in: its topics, its wording, its texts, and the judge of its answers."""
