"""From records to the page `docs/study.md` and its figures."""
