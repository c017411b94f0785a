"""Measure the safety of models, side by side: `python -m bdpo_pl.evaluate [MODEL ...] [any option]`.

MODEL is a Hugging Face folder or hub name, a checkpoint of a run, or `embedded`. `LABEL=MODEL` gives it a label. The
first model is the baseline. Without arguments, the embedded model is compared with the model that the newest run under
`runs` trained from it. The command writes `report.html` and `evaluation.json`, and keeps all verdicts, so that the same
command resumes where it was interrupted. The models' answers are written only if `keep_answers`, `show_texts`,
`export_answers`, `refine` or `attacks.folder` requests them.
"""

from __future__ import annotations

from bdpo_pl.cli.quick import answer_early


def main(args: list[str] | None = None) -> None:
    """Run the job.

    Exit status: 1: a limit is exceeded; 2: an input error, printed without a traceback; 4: a fault of the machine; 70:
    any other error, with its traceback; 128 + the signal's number: a signal.
    """
    given = answer_early("evaluate", args)
    # Imported late: torch takes seconds to import, and a typo should be reported at once.
    from bdpo_pl.cli.command import FAULT_STATUS, run_command
    from bdpo_pl.cli.evaluating import run

    kept = "the verdicts so far are kept in --folder; the same command continues from there"
    run_command(lambda: run(given, __doc__), kept, FAULT_STATUS)


if __name__ == "__main__":
    main()
