"""The way from a plan to records: settings, references, cells and the runner of all cells."""
