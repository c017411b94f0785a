"""A single command for everything: `bdpo diagnose`, `bdpo fit`, `bdpo evaluate`, and tools that combine them."""

from __future__ import annotations

import difflib
import importlib
import sys

from bdpo_pl.cli.quick import refuse

COMMANDS = {
    "diagnose": "analyse a preference set with a model, before training",
    "fit": "align a model on preference pairs",
    "evaluate": "measure the safety of models, side by side",
    "align": "all three in a row, into one folder",
    "review": "label answers, or write chosen responses, in a local web page",
}


def main(args: list[str] | None = None) -> None:
    """Run the command named by the first argument with the remaining arguments."""
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print("usage: bdpo COMMAND [--option VALUE ...]\n\nCommands, in the order of use:")
        print("\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items()))
        print(
            "\nbdpo COMMAND --help shows a command's options. Without options, diagnose,\n"
            "fit and evaluate use the embedded model and pairs."
        )
        sys.exit(0)
    command, *rest = given
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        refuse(
            f"there is no command {command}"
            + (f"; did you mean {close[0]}?" if close else f"; there are {', '.join(COMMANDS)}")
        )
    importlib.import_module(f"bdpo_pl.{command}").main(rest)


if __name__ == "__main__":
    main()
