"""The command line's parser: where a loss is chosen, no other loss's options stay behind."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from bdpo_pl.cli.quick import refuse
from bdpo_pl.cli.ranges import check_ranges
from bdpo_pl.errors import InputError

_LOSS = "model.loss"
_CLASSES = (_LOSS, "model.optimizer")
_LONGEST_ERROR = 400
_BASE_CLASSES = {"optimizer": ("torch.optim", "Optimizer"), "logger": ("lightning.pytorch.loggers", "Logger")}


class OptionParser(LightningArgumentParser):
    """Keeps one loss's options from another.

    Where a class is changed, jsonargparse hands those options down that both classes have. A loss's β means another
    thing in each (0.1 in DPO, 2.5 in SimPO), so that SimPO would silently begin with DPO's. Here a loss named on the
    command line begins with its own defaults, and one named in a file takes over nothing but what files set.
    """

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Namespace:
        """Parse `args`; a loss that they name replaces the one before it, options and all."""
        given = sys.argv[1:] if args is None else args
        reset = [part for arg in given for part in ([f"--{_LOSS}=null", arg] if _names_a_loss(arg) else [arg])]
        parsed = super().parse_args(reset, *rest, **kwargs)
        try:
            check_ranges(parsed)
        except InputError as error:
            if not self.exit_on_error:
                raise
            refuse(str(error))
        return parsed

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """The defaults, options of loss and optimiser left out: they are filled in last, for what was chosen."""
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
        """Say in a few lines what is wrong, without the usage, which has hundreds."""
        if not self.exit_on_error:
            super().error(message, ex)
        refuse(_shortened(message))


def _shortened(message: str) -> str:
    """The parser's complaint: the option, what was given and what is wanted, in five lines at most."""
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


def _names_a_loss(argument: str) -> bool:
    return argument == f"--{_LOSS}" or argument.startswith(f"--{_LOSS}=")
