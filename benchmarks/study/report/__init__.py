"""The page `docs/study.md` and its figures, made from records."""
