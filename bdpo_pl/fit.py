"""Align a model: `python -m bdpo_pl.fit [--config FILE] [any option]`.

With no argument it aligns the small embedded model on the embedded preference set, on whatever machine this is.
`--help` and `--print_config` show every option.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.text import Text

from bdpo_pl import embedded
from bdpo_pl.callbacks import LastCheckpoint, RandomState, SafetyProbe, SaveOnNonFinite
from bdpo_pl.console import get_console
from bdpo_pl.datamodule import PreferenceDataModule
from bdpo_pl.errors import InputError, NonFiniteError
from bdpo_pl.export import export_policy
from bdpo_pl.module import PreferenceModule
from bdpo_pl.summary import paths_table, summary_table

_NAMES_A_JOB = {"--config", "-c", "--model", "--model.policy", "--data", "--data.train"}
_EMBEDDED_CONFIG = Path(embedded.__file__).with_name("fit.yaml")


class FitCLI(LightningCLI):
    """The command line of `fit`: the Trainer's, the module's and the data module's options, and a few of our own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint, the safety probe and where to resume from."""
        parser.add_argument(
            "--ckpt_path",
            default=None,
            type=str | None,
            help="Checkpoint to resume from: a file, or `last`, the newest of all runs.",
        )
        parser.add_argument("--export", default=True, type=bool, help="Write the policy as a Hugging Face folder.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SafetyProbe, "safety")
        parser.set_defaults(
            {
                "checkpoint.monitor": "held_out/loss",
                "checkpoint.mode": "min",
                "checkpoint.filename": "best-step={step}",
                "checkpoint.auto_insert_metric_name": False,
                "model.loss": {"class_path": "bdpo_pl.losses.BalancedDPOLoss"},
            }
        )

    def before_instantiate_classes(self) -> None:
        """Fit the defaults to the machine and to the data."""
        if self.config.trainer.accelerator == "auto" and torch.backends.mps.is_available():
            # Log-probabilities are summed in float64, which Apple's GPUs do not have.
            self.config.trainer.accelerator = "cpu"
        # With nothing held out there is no held-out loss for the checkpoint to watch.
        if self.config.data.held_out is None and self.config.data.held_out_fraction == 0:
            self.config.checkpoint.monitor = None


def main(args: list[str] | None = None) -> None:
    """Run the job. Faults of the input are printed with no traceback and exit with status 2, a NaN loss with 3."""
    run_command(lambda: _run(args))


def run_command(command: Callable[[], None]) -> None:
    """Run `command` and end the process as `main` says."""
    _quieten()
    try:
        command()
    except (ValueError, NonFiniteError, MisconfigurationException) as raised:
        # The parser wraps what a class it instantiates says of its options.
        error = raised.__cause__ if isinstance(raised.__cause__, InputError) else raised
        if not isinstance(error, InputError | NonFiniteError | MisconfigurationException):
            raise
        get_console(stderr=True).print("[bold red]error:[/bold red]", Text(str(error)), soft_wrap=True, highlight=False)
        sys.exit(3 if isinstance(error, NonFiniteError) else 2)


def parse_options(cli_class: type[FitCLI], args: list[str] | None, description: str | None) -> FitCLI:
    """The command line, with everything it names built and nothing started.

    Args:
        cli_class: says which options there are.
        args: the options; None: those of this process.
        description: opens the help.
    """
    given = sys.argv[1:] if args is None else args
    # The embedded run has settings of its own, which must not leak into the runs of others.
    is_embedded = _NAMES_A_JOB.isdisjoint(argument.split("=")[0] for argument in given)
    return cli_class(
        PreferenceModule,
        PreferenceDataModule,
        run=False,
        args=args,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        # Resuming writes into the folder it began in.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "description": description,
            "default_config_files": [str(_EMBEDDED_CONFIG)] if is_embedded else [],
        },
        trainer_defaults={
            "max_epochs": 1,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 5,
            # Before training, validate on everything: the table's "before", and the point the curves start from.
            "num_sanity_val_steps": -1,
            # The batches are split between ranks by our own sampler, which keeps the mean over pairs exact.
            "use_distributed_sampler": False,
            # It would list the metrics as layers; the module says what it trains in one line.
            "enable_model_summary": False,
            "default_root_dir": "runs",
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "runs", "name": ""},
            },
            "callbacks": [LastCheckpoint(), SaveOnNonFinite(), RandomState()],
        },
    )


def _run(args: list[str] | None) -> None:
    start = time.perf_counter()
    cli = parse_options(FitCLI, args, __doc__)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    probe: SafetyProbe = cli.config_init.safety
    checkpoint = _checkpoint(cli.config.ckpt_path, Path(trainer.default_root_dir))
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if module.global_step not in module.evaluations and "held_out" in data.tables:
        trainer.validate(module, data, verbose=False)
    # Asked on every rank: Lightning broadcasts it.
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if not trainer.is_global_zero:
        return
    paths = {"configuration": folder / "config.yaml", "metrics": folder / "metrics.csv"}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            name = "last checkpoint" if isinstance(callback, LastCheckpoint) else "best checkpoint"
            paths[name] = Path(callback.best_model_path)
    if cli.config.export:
        paths["aligned model"] = export_policy(module.policy, data.tokenizer, _free(folder / "model"))
    console = get_console()
    console.print(summary_table(module.evaluations, module.global_step, probe.before, probe.after))
    console.print(paths_table(paths))
    console.print(f"Done in {time.perf_counter() - start:.0f} s, {module.global_step} optimiser steps")


def _checkpoint(path: str | None, root: Path) -> str | None:
    """The checkpoint to resume from; `last` is the newest of all runs under `root`.

    Lightning looks for `last` in the new run's own folder, finds none, and starts over with a warning.

    Raises:
        InputError: there is none: found out now, and not after the scoring pass.
    """
    if path is None or "://" in path:
        return path
    if path == "last":
        found = sorted(root.rglob(f"checkpoints/{LastCheckpoint.NAME}.ckpt"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise InputError(f"--ckpt_path last: no run under {root.resolve()} has a last.ckpt")
        return str(found[-1])
    if not Path(path).exists():
        raise InputError(f"no checkpoint at {path!r} (looked from {Path.cwd()}); see --ckpt_path")
    return path


def _free(folder: Path) -> Path:
    """`folder`, or if a resumed run finds its own earlier export there, the next free name beside it."""
    number = 1
    free = folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


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


if __name__ == "__main__":
    main()
