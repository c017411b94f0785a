"""One command from start to exit status."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable

import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.text import Text

from bdpo_pl.cli.machine_faults import machine_error
from bdpo_pl.console import get_console
from bdpo_pl.errors import InputError, MachineError, NonFiniteError, StoppedError

_STATUS = {InputError: 2, MisconfigurationException: 2, NonFiniteError: 3, MachineError: 4}


def run_command(command: Callable[[], None]) -> None:
    """Run `command` and end the process as `main` says."""
    _quieten()
    try:
        command()
    except StoppedError as stopped:
        _print_error(str(stopped))
        # A process that another one stopped ends well, or Lightning would kill that other one.
        sys.exit(128 + stopped.signal if stopped.signal else 0)
    except Exception as raised:
        # The parser wraps what a class it instantiates says of its options.
        cause = raised.__cause__
        error = cause if isinstance(cause, InputError) and not isinstance(raised, InputError) else raised
        error = machine_error(error) or error
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), None)
        if status is None:
            raise
        _print_error(str(error))
        sys.exit(status)


def _print_error(message: str) -> None:
    get_console(stderr=True).print("[bold red]error:[/bold red]", Text(message), soft_wrap=True, highlight=False)


def _quieten() -> None:
    """Silence warnings that are wrong here, so that the right ones are seen."""
    for message in (
        r".*does not have many workers.*",  # batches are padded token lists: cheap to build
        r".*your dataloader is not resumable.*",  # the data module's own state resumes it
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*LightningCLI's args parameter.*",  # main(args) is for callers in Python
        r".*Total length of `list` across ranks is zero.*",  # nothing held out, as asked for
        r".*isinstance\(treespec, LeafSpec\).*",  # between Lightning and torch
    ):
        warnings.filterwarnings("ignore", message=message)
    # Not a message of the run, but an advertisement.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    if not sys.stderr.isatty():
        # A log file has no use for transformers' bars of loading and saving.
        transformers.utils.logging.disable_progress_bar()
