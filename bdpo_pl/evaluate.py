"""Measure the safety of models, side by side: `python -m bdpo_pl.evaluate [MODEL ...] [any option]`.

MODEL is a Hugging Face folder or hub name, a checkpoint of a run, or `embedded`, each with a label of your own if you
like (`before=MODEL`). The first is the baseline. With no argument: the embedded model, and what the newest run under
`runs` made of it. Writes `report.html` and `evaluation.json`, and keeps verdicts, so that the same command goes on
where it was cut off. What models answer is written only where `keep_answers`, `show_texts` or `refine` asks for it.
"""

from __future__ import annotations

from bdpo_pl.cli.quick import answer_early


def main(args: list[str] | None = None) -> None:
    """Run the job. Faults of the input are printed with no traceback and exit with status 2."""
    given = answer_early("evaluate", args)
    # What follows imports torch, which takes seconds that a typo need not wait for.
    from bdpo_pl.cli.command import run_command
    from bdpo_pl.cli.evaluating import run

    run_command(
        lambda: run(given, __doc__), "verdicts until now are kept in --folder; the same command goes on from there"
    )


if __name__ == "__main__":
    main()
