"""Analyse a preference set with a model, before training: `python -m bdpo_pl.diagnose [any option of fit]`.

Without arguments it analyses the embedded pairs with the embedded model. It takes all options of `bdpo_pl.fit`, so that
one configuration serves both; those of training have no effect. It uses the same cache of scores, so a later `fit` does
not score the pairs again. It writes `report.html`, `diagnosis.json` and `pairs.jsonl`, one line for each pair.
"""

from __future__ import annotations

from bdpo_pl.cli.quick import answer_early


def main(args: list[str] | None = None) -> None:
    """Run the job. Input errors are printed without a traceback, and the exit status is 2."""
    given = answer_early("diagnose", args)
    # What follows imports torch, which takes seconds that a typo need not wait for.
    from bdpo_pl.cli.command import run_command
    from bdpo_pl.cli.diagnosing import run

    run_command(lambda: run(given, __doc__), "the scores so far are cached; the same command continues from there")


if __name__ == "__main__":
    main()
