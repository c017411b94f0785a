"""Answers that a command can give before it imports torch: its help, and errors in options."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from bdpo_pl.cli import aliases, from_trl, known, short_help
from bdpo_pl.cli.ranges import RANGES
from bdpo_pl.errors import InputError

_LOGGERS = {
    "TensorBoardLogger": ("tensorboard", ("tensorboard", "tensorboardX")),
    "WandbLogger": ("wandb", ("wandb",)),
    "MLFlowLogger": ("mlflow", ("mlflow", "mlflow_skinny")),
    "CometLogger": ("comet-ml", ("comet_ml",)),
    "NeptuneLogger": ("neptune", ("neptune",)),
    "TrackioLogger": ("trackio", ("trackio",)),
}
"""Package to install and modules, one of which is required, for each logger."""

# A file may name the data; a memory plan and help need none.
_WANTS_NO_DATA = {"--config", "-c", "--data", "--data.train", "--dry_run", "--model.loss.help", "--help_all"}
_TRAINS = ("fit", "diagnose")

_NUMBERS = frozenset({
    "model.optimizer.lr", "model.optimizer.weight_decay", "model.loss.beta", "model.lora.r", "data.batch_size",
    "data.eval_batch_size", "data.max_length", "trainer.max_steps", "trainer.max_epochs",
    "trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "max_prompts", "generation.max_new_tokens",
})  # fmt: skip
"""Common options whose value cannot be a word; the parser would refuse a word too, but only after its imports."""
_WORDS = ("null", "none", "auto", "inf")


def answer_early(command: str, args: Sequence[str] | None) -> list[str]:
    """Print the short help and exit, or refuse invalid options; otherwise return the options with full names.

    Args:
        command: `fit`, `diagnose` or `evaluate`.
        args: command-line options; None: those of this process.
    """
    given = list(sys.argv[1:] if args is None else args)
    if "--help" in given or "-h" in given:
        print(short_help.page(command))
        sys.exit(0)
    try:
        if command in _TRAINS:
            given = aliases.in_full(given)
        _check(command, given)
    except InputError as error:
        refuse(str(error))
    return ["--help" if arg == "--help_all" else arg for arg in given]


def refuse(message: str) -> NoReturn:
    """Print why the command cannot start, and exit with status 2."""
    colour = ("\x1b[1;31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{colour[0]}error:{colour[1]} {message}", file=sys.stderr)
    sys.exit(2)


def _check(command: str, args: Sequence[str]) -> None:
    table = known.read()
    names, free = (
        set(table[command]["options"]) | {"help", "help_all", "print_config"},
        tuple(f"{name}." for name in table[command]["open"]),
    )
    for i, arg in enumerate(args):
        if not arg.startswith("--") or arg == "--":
            continue
        name, _, value = arg[2:].partition("=")
        value = value or (args[i + 1] if i + 1 < len(args) else "")
        name = name.removesuffix("+")
        if name in _NUMBERS and value.isalpha() and value.lower() not in _WORDS:
            raise InputError(f"--{name} must be a number {RANGES[name]}, got {value}")
        if name in ("model.loss", "trainer.logger"):
            _check_class(name, value, table["losses"])
        if name.startswith("model.loss.") and name != "model.loss.help":
            _check_loss_option(name, args, table["losses"])
        elif command in _TRAINS and name not in names and (said := from_trl.answer(name)):
            raise InputError(said)
        # Names without a similar known name are left to the parser.
        elif name not in names and not name.startswith(free) and (close := _close(name, command, names)):
            raise InputError(f"there is no option --{name}; did you mean {close}?")
    if command in _TRAINS:
        _check_data(args)


def _close(name: str, command: str, names: set[str]) -> str:
    """Return a suggestion for a misspelt option; empty if nothing is similar."""
    spellings = {known_name: known_name for known_name in names if not known_name.endswith(".help")}
    if command in _TRAINS:
        spellings |= {short: short for short in (*aliases.SHORT, *aliases.CHOSEN)}
    # Only the last part, as people remember it.
    ends: dict[str, list[str]] = {}
    for full in spellings:
        ends.setdefault(full.rpartition(".")[2], []).append(full)
    found = difflib.get_close_matches(name, spellings, n=2, cutoff=0.75)
    if not found:
        last = name.rpartition(".")[2]
        for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.8):
            found = sorted(ends[end], key=len)[:2]
    return " or ".join(f"--{spelling}" for spelling in found)


def _check_class(option: str, value: str, losses: Mapping[str, Sequence[str]]) -> None:
    last = value.rpartition(".")[2]
    if option == "trainer.logger":
        package, modules = _LOGGERS.get(last, ("", ()))
        if modules and not any(map(importlib.util.find_spec, modules)):
            raise InputError(f"{last} needs the package {package}, which is not installed: pip install {package}")
        return
    # Dotted paths are the user's own classes, and braces hold options beside the name.
    ours = "." not in value or value.startswith("bdpo_pl.losses.")
    if ours and value.isidentifier() | value.startswith("bdpo_pl.losses.") and last not in losses and last != "null":
        meant = difflib.get_close_matches(last, losses, n=1, cutoff=0.5)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        raise InputError(
            f"--{option}: there is no loss {last}{hint}\nThere are {', '.join(losses)}, and the class_path of a "
            "PreferenceLoss of your own."
        )


def _check_loss_option(name: str, args: Sequence[str], losses: Mapping[str, Sequence[str]]) -> None:
    """Refuse an option that the chosen loss does not have, if the command line names one of our losses."""
    chosen = "BalancedDPOLoss"
    for i, arg in enumerate(args):
        if arg == "--model.loss" or arg.startswith("--model.loss="):
            chosen = (arg.partition("=")[2] or args[min(i + 1, len(args) - 1)]).rpartition(".")[2]
        elif arg.startswith(("--config", "-c", "--model=")) or arg == "--model":
            # A file may choose another.
            chosen = ""
    own = name.removeprefix("model.loss.").removeprefix("init_args.").removeprefix("dict_kwargs.")
    if chosen not in losses or own in (*losses[chosen], "class_path", "init_args", "dict_kwargs"):
        return
    meant = difflib.get_close_matches(own, losses[chosen], n=1, cutoff=0.6)
    hint = f"; did you mean --model.loss.{meant[0]}?" if meant else ""
    raise InputError(f"{chosen} has no option {own}{hint}\nIt has {', '.join(losses[chosen])}.")


def _check_data(args: Sequence[str]) -> None:
    names = {arg.partition("=")[0] for arg in args}
    if "--model.policy" in names and names.isdisjoint(_WANTS_NO_DATA):
        raise InputError(
            "--model.policy names a model, but nothing to train it on: add --data.train FILE (JSONL or Parquet with "
            "prompt, chosen, rejected), or --data.train embedded for the small set of bdpo_pl"
        )
