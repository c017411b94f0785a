"""From a plan to records: settings, references, cells and the runner of them all."""
