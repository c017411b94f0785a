"""The command line's parser: where a loss is chosen, no other loss's options stay behind."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from bdpo_pl import losses

_LOSS = "model.loss"


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
        return super().parse_args(reset, *rest, **kwargs)

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """The defaults, the loss's options left out: they are filled in last, for the loss that was chosen."""
        defaults = super().get_defaults(*args, **kwargs)
        loss = defaults.get(_LOSS)
        if loss is not None and "init_args" in loss:
            parameters = inspect.signature(getattr(losses, loss.class_path.rpartition(".")[2])).parameters
            for name, value in list(vars(loss.init_args).items()):
                if value == parameters[name].default:
                    del loss.init_args[name]
        return defaults


def _names_a_loss(argument: str) -> bool:
    return argument == f"--{_LOSS}" or argument.startswith(f"--{_LOSS}=")
