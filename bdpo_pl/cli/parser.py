"""The command line's parser, which discards the options of a loss when another loss is chosen."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from bdpo_pl.cli.misfits import KINDS, check_nulls
from bdpo_pl.cli.quick import refuse
from bdpo_pl.cli.ranges import check_ranges
from bdpo_pl.errors import InputError

_LOSS = "model.loss"
_CLASSES = (_LOSS, "model.optimizer")
_FILES = ("data.train", "data.held_out")
_LONGEST_ERROR = 400
_BASE_CLASSES = {"optimizer": ("torch.optim", "Optimizer"), "logger": ("lightning.pytorch.loggers", "Logger")}


class OptionParser(LightningArgumentParser):
    """A parser that keeps the options of different losses apart.

    When a class is changed, jsonargparse passes on the options that both classes have. But β has a different meaning in
    each loss (0.1 in DPO, 2.5 in SimPO), so SimPO would silently start with DPO's value. Here a loss named on the
    command line starts with its own defaults, and one named in a file takes over only what files set.
    """

    def parse_args(self, args: Sequence[str] | None = None, *rest: object, **kwargs: object) -> Namespace:
        """Parse `args`; a loss that they name replaces the previous one, including its options."""
        for action in self._actions:
            if action.dest in _FILES:
                # jsonargparse would put the content of a file in the place of its path, as a file with options.
                action._enable_path = False
        given = _single_source(sys.argv[1:] if args is None else args)
        reset = [part for arg in given for part in ([f"--{_LOSS}=null", arg] if _names_a_loss(arg) else [arg])]
        parsed = super().parse_args(reset, *rest, **kwargs)
        try:
            # An option whose default is null may be null, whatever its type.
            filled = [action for action in self._actions if action.default is not None]
            check_nulls(parsed, {action.dest: getattr(action, "_typehint", Any) for action in filled})
            check_ranges(parsed)
        except InputError as error:
            if not self.exit_on_error:
                raise
            refuse(str(error))
        return parsed

    def get_defaults(self, *args: object, **kwargs: object) -> Namespace:
        """Return the defaults without options of loss and optimiser, which are filled in last, for the chosen class."""
        defaults = super().get_defaults(*args, **kwargs)
        for option in _CLASSES:
            chosen = defaults.get(option)
            if chosen is not None and "init_args" in chosen:
                module, _, name = chosen.class_path.rpartition(".")
                parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
                for argument, value in list(vars(chosen.init_args).items()):
                    if value == parameters[argument].default:
                        del chosen.init_args[argument]
        return defaults

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print in a few lines what is wrong, without the usage text, which has hundreds."""
        if not self.exit_on_error:
            super().error(message, ex)
        refuse(_shortened(message))


def _single_source(arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with a single source of pairs that has options as a list of one; else it would be a path."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if option == "--data.train" and value.lstrip().startswith("{"):
            argument = f"{option}{equals}[{value}]"
        elif before == "--data.train" and argument.lstrip().startswith("{"):
            argument = f"[{argument}]"
        found.append(argument)
    return found


def _shortened(message: str) -> str:
    """Return the parser's message: the option, the given value and the expected one, in at most five lines."""
    if misfit := _misfit(message):
        return misfit
    found = re.search(r'Parser key "([^"]+)"', message)
    given = re.search(r"(?:Expected a dot import path string|Given value): (.*)", message)
    base = _BASE_CLASSES.get(found[1].rpartition(".")[2]) if found else None
    if found and given and base and not re.search(r"[.{\s]", given[1]):
        module = importlib.import_module(base[0])
        kind = getattr(module, base[1])
        names = sorted(
            n for n, o in vars(module).items() if isinstance(o, type) and issubclass(o, kind) and o is not kind
        )
        return f"--{found[1]}: there is no {given[1]}\nThere are {', '.join(names)}."
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    text = " ".join(lines)
    if len(text) > _LONGEST_ERROR:
        text = text[:_LONGEST_ERROR].rsplit(" ", 1)[0] + " …"
    return text + "\n--help shows the options one needs, --help_all all of them."


_TYPES = {kind.__name__: text for kind, text in KINDS.items()} | {
    "tuple": "a list", "dict": "a mapping", "NoneType": "null",
}  # fmt: skip


def _misfit(message: str) -> str | None:
    """Return option, allowed and given value, if the parser names them in the middle of its list of attempts."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    option = ".".join(key for i, key in enumerate(keys) if i == 0 or key != keys[i - 1])
    if keys and (unknown := re.search(r"Option '([\w.]+)' is not accepted", message)):
        return f"--{option}.{unknown[1]}: there is no such option"
    # The innermost option's message is last, and text about the outer options follows it.
    own = message.rpartition('Parser key "')[2]
    expected = re.split("Got value|Given value", own)[0]
    kinds = [
        _TYPES.get(kind, kind) if kind else choices.replace("'", "")
        for kind, choices in re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\])", expected)
    ]
    given = re.search(r"(?:Got|Given) value: (.*?)(?=\.? Got value|\n|$)", own)
    if not keys or not given or not set(kinds) - {"null"}:
        return None
    return f"--{option} must be {' or '.join(dict.fromkeys(kinds))}; got {given[1][:60]}"


def _names_a_loss(argument: str) -> bool:
    return argument == f"--{_LOSS}" or argument.startswith(f"--{_LOSS}=")
