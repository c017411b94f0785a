"""Look at a preference set through a model's eyes, before training: `python -m bdpo_pl.diagnose [any option of fit]`.

With no argument it looks at the embedded model and pairs. It takes the options of `bdpo_pl.fit`, of which those of
training change nothing, so that one configuration serves both, and scores into the same cache: a `fit` that follows
scores nothing anew. It writes `report.html`, `diagnosis.json` and `pairs.jsonl`, a line a pair.
"""

from __future__ import annotations

from bdpo_pl.cli.quick import answer_early


def main(args: list[str] | None = None) -> None:
    """Run the job. Faults of the input are printed with no traceback and exit with status 2."""
    given = answer_early("diagnose", args)
    # What follows imports torch, which takes seconds that a typo need not wait for.
    from bdpo_pl.cli.command import run_command
    from bdpo_pl.cli.diagnosing import run

    run_command(lambda: run(given, __doc__), "scores until now are cached; the same command goes on from there")


if __name__ == "__main__":
    main()
