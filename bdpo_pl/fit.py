"""Align a model: `python -m bdpo_pl.fit [--config FILE] [any option]`.

Without arguments it aligns the small embedded model on the embedded preference set, on any machine.
`--help` shows the most used options, `--help_all` and `--print_config` every one.
"""

from __future__ import annotations

from bdpo_pl.cli.quick import answer_early


def main(args: list[str] | None = None) -> None:
    """Run the job; if it ends early, print the reason in one line.

    Exit status: 2: an input error; 3: a loss or gradient that is not finite; 4: a fault of the machine; 128 + the
    number of the signal that stopped it.
    """
    given = answer_early("fit", args)
    # What follows imports torch, which takes seconds that a typo need not wait for.
    from bdpo_pl.cli.aligning import run
    from bdpo_pl.cli.command import run_command

    run_command(lambda: run(given, __doc__))


if __name__ == "__main__":
    main()
