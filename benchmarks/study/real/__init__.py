"""The study with a real model and real pairs, which `docs/study_real.md` registers."""
