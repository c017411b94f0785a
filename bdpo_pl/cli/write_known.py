"""Update of the stored option names after an option was added: `python -m bdpo_pl.cli.write_known`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from typing import Any

from jsonargparse import ArgumentParser

from bdpo_pl import losses
from bdpo_pl.cli.diagnosing import DiagnoseCLI
from bdpo_pl.cli.job import FitCLI, make_parser
from bdpo_pl.cli.known import FILE
from bdpo_pl.evaluation.options import add_options


def collect() -> dict[str, Any]:
    """Collect from the parsers what `known.read` returns."""
    found: dict[str, Any] = {
        "losses": {
            name: list(inspect.signature(kind).parameters)
            for name in sorted(losses.__all__)
            if isinstance(kind := getattr(losses, name), type)
            and issubclass(kind, losses.PreferenceLoss)
            and kind is not losses.PreferenceLoss
        }
    }
    evaluate = ArgumentParser()
    add_options(evaluate)
    for command, parser in (
        ("fit", make_parser(FitCLI)),
        ("diagnose", make_parser(DiagnoseCLI)),
        ("evaluate", evaluate),
    ):
        found[command] = _names(parser)
    return found


def _names(parser: ArgumentParser) -> dict[str, list[str]]:
    options, free = set(), set()
    for action in parser._actions:
        for name in action.option_strings:
            if not name.startswith("--"):
                continue
            name = name.removeprefix("--")
            options.add(name)
            if f"--{name}.help" not in parser._option_string_actions:
                continue
            inner = _options_class(getattr(action, "_typehint", None))
            if inner is None:
                free.add(name)
            else:
                options |= {f"{name}.{field.name}" for field in dataclasses.fields(inner)}
                # Nested options of options are left to the parser.
                free |= {f"{name}.{field.name}" for field in dataclasses.fields(inner)}
    return {"options": sorted(options), "open": sorted(free)}


def _options_class(hint: object) -> Any:
    """Return the dataclass that is the only type of an option, apart from None; otherwise None."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]) else None


if __name__ == "__main__":
    FILE.write_text(json.dumps(collect(), indent=1) + "\n", encoding="utf-8")
