"""Execution of one command, from start to exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.text import Text

from bdpo_pl.cli.machine_faults import machine_error
from bdpo_pl.console import get_console, printable
from bdpo_pl.errors import InputError, MachineError, NonFiniteError, StoppedError, first_line

_STATUS = {InputError: 2, MisconfigurationException: 2, NonFiniteError: 3, MachineError: 4}

_NOISE = (
    "litlogger",
    "GPU available: False",
    "TPU available: False",
    "Loading `train_dataloader` to estimate",
    "`Trainer(val_check_interval=1.0)` was configured",
    "`weights_only` was not set",
    "`Trainer.fit` stopped:",
)


FAULT_STATUS = 70
"""Exit status of a bug, as `EX_SOFTWARE` of sysexits.h, where Python's own status, 1, has another meaning."""


def run_command(command: Callable[[], None], kept: str = "", fault_status: int | None = None) -> None:
    """Run `command` and end the process with the exit status that `main` describes.

    Args:
        command: Function that does the work.
        kept: Text that describes what a signal leaves behind and how to continue, if the command itself does not.
        fault_status: Exit status after the traceback of an error that is none of these; None: the error is raised.
    """
    _quieten()
    received: list[int] = []
    try:
        with _signals_stop(received):
            command()
    except StoppedError as stopped:
        _print_error(str(stopped) if stopped.saved or not kept else f"{stopped}; {kept}")
        # A process stopped by another one exits normally; otherwise Lightning would kill that other process.
        sys.exit(128 + stopped.signal if stopped.signal else 0)
    except Exception as raised:
        if received:
            # Either another process was stopped too, or something turned the signal into an error of its own.
            _print_error(f"stopped by {signal.Signals(received[0]).name} ({first_line(raised)}); {kept}".rstrip("; "))
            sys.exit(128 + received[0])
        # The parser wraps what a class that it instantiates reports about its options.
        cause = raised.__cause__
        error = cause if isinstance(cause, InputError) and not isinstance(raised, InputError) else raised
        error = machine_error(error) or error
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), None)
        if status is None and fault_status is not None:
            traceback.print_exception(raised)
            raise SystemExit(fault_status) from raised
        if status is None:
            raise
        if isinstance(error, MachineError):
            _let_children_die()
        _print_error(str(error))
        sys.exit(status)


@contextmanager
def _signals_stop(received: list[int]) -> Iterator[None]:
    """Make SIGINT and SIGTERM raise `StoppedError` anywhere in the command; append each signal to `received`.

    In training, the callback `StopSignals` installs its own handler before this one, which finishes the step first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        # Workers inherit the handler; this process ends them.
        if os.getpid() == process:
            received.append(number)
            raise StoppedError(f"stopped by {signal.Signals(number).name}", number)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _let_children_die() -> None:
    """Take torch's handler of SIGCHLD away: memory that runs out ends several data workers, and it raises for each."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _print_error(message: str) -> None:
    get_console(stderr=True).print(
        "[bold red]error:[/bold red]", Text(printable(message)), soft_wrap=True, highlight=False
    )


def _quieten() -> None:
    """Silence warnings that are wrong here, so that the right ones are noticed."""
    for message in (
        r".*does not have many workers.*",  # batches are padded token lists: cheap to build
        r".*your dataloader is not resumable.*",  # the data module's own state resumes it
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*LightningCLI's args parameter.*",  # main(args) is for callers in Python
        r".*Total length of `list` across ranks is zero.*",  # nothing is held out, as the user requested
        r".*isinstance\(treespec, LeafSpec\).*",  # between Lightning and torch
        r".*predict returned None.*",  # diagnosis scores in the set-up, and predicts nothing
        r".*The dirpath has changed from.*",  # of last.ckpt: `KeepsBest` takes over the best one
        r".*could not find the monitored key in the returned metrics.*",  # a run that ends before its first validation
        r".*was configured so validation will run.*",  # the user requested it
    ):
        warnings.filterwarnings("ignore", message=message)
    # Not messages about the run: advertisements, missing features of the machine, and internals of Lightning.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(noise in record.getMessage() for noise in _NOISE)
    )
    if not sys.stderr.isatty():
        # Bars for loading and saving in transformers are useless in a log file.
        transformers.utils.logging.disable_progress_bar()
