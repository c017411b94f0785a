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
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.text import Text

import bdpo_pl.sharding  # noqa: F401 - names the strategy fsdp2
from bdpo_pl import embedded
from bdpo_pl.callbacks import LastCheckpoint, RandomState, SaveOnNonFinite
from bdpo_pl.checkpoints import StopSignals, find_checkpoint, write_atomically
from bdpo_pl.console import get_console
from bdpo_pl.datamodule import PreferenceDataModule
from bdpo_pl.errors import InputError, MachineError, NonFiniteError, StoppedError
from bdpo_pl.export import export_adapters, export_model
from bdpo_pl.faults import machine_error
from bdpo_pl.memory_plan import planned
from bdpo_pl.module import PreferenceModule
from bdpo_pl.options import OptionParser
from bdpo_pl.run_folder import RunFolder
from bdpo_pl.safety_probe import SafetyProbe, StopAtGap
from bdpo_pl.sharded_state import whole_state
from bdpo_pl.summary import paths_table, summary_table

_NAMES_A_JOB = {"--config", "-c", "--model", "--model.policy", "--data", "--data.train"}
_STATUS = {InputError: 2, MisconfigurationException: 2, NonFiniteError: 3, MachineError: 4}
_MONITOR = "held_out/loss"
_EMBEDDED_CONFIG = Path(embedded.__file__).with_name("fit.yaml")


class FitCLI(LightningCLI):
    """The command line of `fit`: the Trainer's, the module's and the data module's options, and a few of our own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint, the safety probe and where to resume from."""
        parser.add_argument(
            "--ckpt_path",
            default=None,
            type=str | None,
            help="Checkpoint to resume from: a file, or `last`, the newest whole one of all runs.",
        )
        parser.add_argument("--export", default=True, type=bool, help="Write the policy as a Hugging Face folder.")
        parser.add_argument(
            "--export_adapter", default=False, type=bool, help="Write a LoRA adapter alone too, in peft's layout."
        )
        parser.add_argument(
            "--dry_run",
            default=False,
            type=bool,
            help="Print what each device needs of memory, and do nothing else: no weights are read.",
        )
        parser.add_argument(
            "--export_from",
            default="last",
            type=Literal["last", "best"],
            help="Which weights to export: those the run ends with, or those of the best checkpoint.",
        )
        parser.add_argument(
            "--stop_at_gap",
            default=None,
            type=float | None,
            help="Stop when the policy overfits: when gap/margin (training − held-out) exceeds this at a validation.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SafetyProbe, "safety")
        parser.set_defaults(
            {
                "checkpoint.monitor": _MONITOR,
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
        if self._holds_out_nothing() and self.config.checkpoint.monitor == _MONITOR:
            self.config.checkpoint.monitor = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer, which stops at a gap if that is wanted."""
        trainer = super().instantiate_trainer(**kwargs)
        config, probe = self.config, self.config_init.safety
        for option, wanted in (
            ("safety.every_n_steps measures at validations, and", probe.every_n_steps is not None),
            ("stop_at_gap", config.stop_at_gap is not None),
            ("export_from best", config.export_from == "best"),
        ):
            if wanted and self._holds_out_nothing():
                raise InputError(f"{option} needs held-out pairs: set data.held_out, or data.held_out_fraction above 0")
        probe.check_monitor(config.checkpoint.monitor, config.checkpoint.mode)
        if config.export_from == "best" and config.checkpoint.monitor is None:
            raise InputError("export_from is best, but no checkpoint is chosen: set checkpoint.monitor")
        if config.stop_at_gap is not None:
            if not config.data.train_probe:
                raise InputError("stop_at_gap needs the gap, which training pairs tell: set data.train_probe to true")
            trainer.callbacks.insert(0, StopAtGap(config.stop_at_gap))  # type: ignore[attr-defined]
        return trainer

    def _holds_out_nothing(self) -> bool:
        return self.config.data.held_out is None and self.config.data.held_out_fraction == 0


def main(args: list[str] | None = None) -> None:
    """Run the job, and say in one line why it ended early.

    Exit status: 2 a fault of the input, 3 a loss or gradient that is not finite, 4 a fault of the machine, 128 + the
    signal's number where one stopped it.
    """
    run_command(lambda: _run(args))


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
        parser_class=OptionParser,
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
            "callbacks": [LastCheckpoint(), SaveOnNonFinite(), RandomState(), StopSignals()],
        },
    )


def _run(args: list[str] | None) -> None:
    start = time.perf_counter()
    cli = parse_options(FitCLI, args, __doc__)
    trainer = cli.trainer
    if cli.config.dry_run:
        get_console().print(planned(trainer, cli.model, cli.datamodule).table())
        return
    checkpoint = find_checkpoint(cli.config.ckpt_path, Path(trainer.default_root_dir))
    write_atomically(trainer)
    # Known to rank 0 alone, which writes it; the others wait for it where the strategy sets up.
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    with RunFolder(Path(trainer.log_dir or trainer.default_root_dir)) if first else nullcontext():
        _align(cli, checkpoint, start)


def _align(cli: FitCLI, checkpoint: str | None, start: float) -> None:
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if module.global_step not in module.evaluations and "held_out" in data.tables:
        trainer.validate(module, data, verbose=False)
    # Asked on every rank: Lightning broadcasts it.
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    # All ranks give their parts.
    state = None if _is_plain(module, trainer) else whole_state(module.policy, module.lora is not None)
    if not trainer.is_global_zero:
        return
    paths = {"configuration": folder / "config.yaml", "metrics": folder / "metrics.csv"}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            name = "last checkpoint" if isinstance(callback, LastCheckpoint) else "best checkpoint"
            paths[name] = Path(callback.best_model_path)
    if cli.config.export:
        best = _best(trainer) if cli.config.export_from == "best" else None
        paths["aligned model"] = export_model(module, data.tokenizer, folder / "model", state, best)
    if cli.config.export_adapter and module.lora is not None:
        assert state is not None
        paths["adapter"] = export_adapters(module, folder / "adapter", state)
    probe: SafetyProbe = cli.config_init.safety
    console = get_console()
    console.print(summary_table(module.evaluations, module.global_step, probe.before, probe.after))
    console.print(paths_table(paths))
    console.print(f"Done in {time.perf_counter() - start:.0f} s, {module.global_step} optimiser steps")


def _is_plain(module: PreferenceModule, trainer: L.Trainer) -> bool:
    return module.lora is None and not isinstance(trainer.strategy, ModelParallelStrategy)


def _best(trainer: L.Trainer) -> Path:
    """The best checkpoint; known on every rank."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_model_path:
            return Path(callback.best_model_path)
    raise InputError(
        "export_from is best, but no validation chose a checkpoint: lower trainer.val_check_interval, or go on with "
        "--ckpt_path last --export_from last"
    )


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
