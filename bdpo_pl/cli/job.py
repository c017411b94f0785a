"""The job that options describe: model, data and Trainer, built but not started."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from bdpo_pl import embedded
from bdpo_pl.cli.combinations import check_combinations, check_kept, check_monitor, never_validates, one_or_more
from bdpo_pl.cli.misfits import refuse_misfit
from bdpo_pl.cli.parser import OptionParser
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError, first_line
from bdpo_pl.training.callbacks import LastCheckpoint, LogInterval, RandomState, SaveOnNonFinite, StopAtGap
from bdpo_pl.training.checkpoints import StopSignals
from bdpo_pl.training.completions import LogCompletions
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.identity import ResumeOptions
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.run_progress import RunProgress
from bdpo_pl.training.safety_probe import SafetyProbe

_NAMES_A_JOB = {"--config", "-c", "--model", "--model.policy", "--data", "--data.train"}
_SHOWS_OPTIONS = {"-h", "--help", "--print_config"}

_MONITOR = "held_out/loss"
_RUNS = "runs"

_EMBEDDED_CONFIG = Path(embedded.__file__).with_name("fit.yaml")


class FitCLI(LightningCLI):
    """The command line of `fit`: options of the Trainer, the module and the data module, and a few of our own."""

    gives_data = True
    """True if there are pairs, or if a memory plan without pairs is requested."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the checkpoint, the safety probe, the completions and resuming."""
        parser.add_argument(
            "--ckpt_path",
            default=None,
            type=str | None,
            help="Checkpoint to resume from: a file, `last` for the newest whole checkpoint of all runs, or "
            "`auto` for that if there is one, for a command that a launcher repeats.",
        )
        parser.add_argument("--export", default=True, type=bool, help="Write the policy as a Hugging Face folder.")
        parser.add_argument(
            "--export_adapter",
            default=False,
            type=bool,
            help="Write the LoRA adapter separately too, in peft's format.",
        )
        parser.add_argument(
            "--push_to_hub",
            default=None,
            type=str | None,
            help="Repository on the Hugging Face hub, OWNER/NAME, that gets the exported model and its card.",
        )
        parser.add_argument(
            "--hub_private_repo",
            default=True,
            type=bool,
            help="Make that repository private, if it does not exist yet.",
        )
        parser.add_argument(
            "--dry_run",
            default=False,
            type=bool,
            help="Print the memory that each device needs, and do nothing else: no weights are read.",
        )
        parser.add_argument(
            "--export_from",
            default="last",
            type=Literal["last", "best"],
            help="Weights to export: those at the end of the run (`last`), or those of the best checkpoint (`best`).",
        )
        parser.add_argument(
            "--stop_at_gap",
            default=None,
            type=float | None,
            help="Limit of gap/margin (training − held-out): if a validation exceeds it, training stops, to prevent "
            "overfitting.",
        )
        parser.add_class_arguments(ResumeOptions, "resume")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SafetyProbe, "safety")
        parser.add_lightning_class_args(LogCompletions, "completions")
        parser.set_defaults(
            {
                "checkpoint.monitor": _MONITOR,
                "checkpoint.mode": "min",
                "checkpoint.filename": "best-step={step}",
                "checkpoint.auto_insert_metric_name": False,
                # The whole state, three times as large, is in last.ckpt, from which runs are resumed.
                "checkpoint.save_weights_only": True,
                "model.loss": {"class_path": "bdpo_pl.losses.BalancedDPOLoss"},
                # The embedded pairs are for the embedded model; a user's own model is never trained on them by default.
                "data.train": None,
            }
        )
        # A file of defaults names the optimiser itself; a default set here would remove its class and keep its options.
        if not parser.default_config_files:
            parser.set_defaults({"model.optimizer": {"class_path": "bdpo_pl.training.optim.AdamW"}})

    def before_instantiate_classes(self) -> None:
        """Adapt the defaults to the machine and to the data."""
        if self.config.trainer.accelerator == "auto" and torch.backends.mps.is_available():
            # Log-probabilities are summed in float64, which Apple's GPUs do not support.
            self.config.trainer.accelerator = "cpu"
        if self.config.data.train is None:
            if self.config.model.policy != EMBEDDED and not self.config.dry_run:
                raise InputError(
                    f"model.policy is {self.config.model.policy}, but there is nothing to train it on: set data.train "
                    "to a file of pairs, or to embedded for the small set of bdpo_pl"
                )
            # A memory plan alone needs no pairs.
            self.config.data.train = EMBEDDED
            self.gives_data = self.config.model.policy == EMBEDDED
        logger = self.config.trainer.logger
        if isinstance(logger, Namespace) and logger.get("init_args.save_dir") == _RUNS:
            # One option for all output.
            logger.init_args.save_dir = self.config.trainer.default_root_dir
        # With nothing held out there is no held-out loss for the checkpoint to monitor.
        if self._holds_out_nothing() and self.config.checkpoint.monitor == _MONITOR:
            self.config.checkpoint.monitor = None

    def instantiate_trainer(self, **kwargs: object) -> L.Trainer:
        """Return the Trainer, which stops at a gap if requested."""
        check_kept(self.config.trainer)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, ModuleNotFoundError) as error:
            if isinstance(error, InputError):
                raise
            # The Trainer checks what only it knows: devices, strategies, plugins and their packages.
            raise InputError(f"the trainer options do not make a Trainer: {first_line(error)}") from error
        config, probe = self.config, self.config_init.safety
        for option, wanted in (
            ("safety.every_n_steps measures at validations, and", probe.every_n_steps is not None),
            ("completions.num_prompts completes held-out prompts, and", self.config_init.completions.num_prompts > 0),
            ("stop_at_gap", config.stop_at_gap is not None),
            ("export_from best", config.export_from == "best"),
        ):
            if wanted and self._holds_out_nothing():
                raise InputError(f"{option} needs held-out pairs: set data.held_out, or data.held_out_fraction above 0")
            # Completions are made before and after training too.
            if wanted and not option.startswith("completions.") and (remedy := never_validates(config.trainer)):
                raise InputError(f"{option} needs a validation, and the run would have none: {remedy}")
        probe.check_monitor(config.checkpoint.monitor, config.checkpoint.mode)
        check_combinations(config, self.parser.get_defaults())
        check_monitor(config.checkpoint.monitor, self.model, config, probe)
        if config.export_from == "best" and config.checkpoint.monitor is None:
            raise InputError("export_from is best, but no checkpoint is chosen: set checkpoint.monitor")
        if config.stop_at_gap is not None:
            if not config.data.train_probe:
                raise InputError(
                    "stop_at_gap needs the gap, which is measured on training pairs: set data.train_probe to true"
                )
            trainer.callbacks.insert(0, StopAtGap(config.stop_at_gap))  # type: ignore[attr-defined]
        if config.trainer.log_every_n_steps is None:
            trainer.callbacks.insert(0, LogInterval())  # type: ignore[attr-defined]
        # Last, so that it can link its file to a checkpoint that another callback has written.
        trainer.callbacks.sort(key=lambda callback: isinstance(callback, LastCheckpoint))  # type: ignore[attr-defined]
        if type(trainer.progress_bar_callback) in (RichProgressBar, TQDMProgressBar) and not any(
            isinstance(callback, ProgressBar) for callback in one_or_more(self.config_init.trainer.callbacks)
        ):
            # Replaces Lightning's own bar, unless that was requested by name.
            at = trainer.callbacks.index(trainer.progress_bar_callback)  # type: ignore[attr-defined]
            trainer.callbacks[at] = RunProgress()  # type: ignore[attr-defined]
        return trainer

    def _holds_out_nothing(self) -> bool:
        return self.config.data.held_out is None and self.config.data.held_out_fraction == 0


def parse_options(cli_class: type[FitCLI], args: list[str] | None, description: str | None) -> FitCLI:
    """Parse the command line and build everything that it names, without starting anything.

    Args:
        cli_class: class that defines the options.
        args: command-line options; None: those of this process.
        description: first text of the help.
    """
    given = sys.argv[1:] if args is None else args
    # The embedded run has its own settings, which must not affect other runs. Printed options are a start for those.
    is_embedded = (_NAMES_A_JOB | _SHOWS_OPTIONS).isdisjoint(argument.split("=")[0] for argument in given)
    try:
        return cli_class(args=args, **_settings(description, is_embedded))
    except ValueError as error:
        refuse_misfit(error)


def make_parser(cli_class: type[FitCLI], embedded_run: bool = False) -> OptionParser:
    """Build the parser of a command, which knows its options and defaults."""
    made: list[OptionParser] = []

    class _Asked(cli_class):  # type: ignore[valid-type,misc]
        def parse_arguments(self, parser: LightningArgumentParser, args: object) -> None:
            made.append(cast(OptionParser, parser))
            raise _ParserMade

    with suppress(_ParserMade):
        _Asked(args=[], **_settings(None, embedded_run))
    return made[0]


class _ParserMade(Exception):  # noqa: N818 - no error
    """A signal that ends the construction of a command line before anything is parsed."""


def _settings(description: str | None, embedded_run: bool) -> dict[str, Any]:
    return {
        "model_class": PreferenceModule,
        "datamodule_class": PreferenceDataModule,
        "run": False,
        "parser_class": OptionParser,
        "seed_everything_default": 42,
        "auto_configure_optimizers": False,
        # A resumed run writes into its original folder.
        "save_config_kwargs": {"overwrite": True},
        "parser_kwargs": {
            "description": description,
            "default_config_files": [str(_EMBEDDED_CONFIG)] if embedded_run else [],
        },
        "trainer_defaults": {
            "max_epochs": 1,
            "gradient_clip_val": 1.0,
            # By the length of the run.
            "log_every_n_steps": None,
            # Validate on everything before training: the table's "before", and the first point of the curves.
            "num_sanity_val_steps": -1,
            # The batches are divided between ranks by our own sampler, which keeps the mean over pairs exact.
            "use_distributed_sampler": False,
            # It would list the metrics as layers; the module reports what it trains in one line.
            "enable_model_summary": False,
            "default_root_dir": _RUNS,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": _RUNS, "name": ""},
            },
            "callbacks": [LastCheckpoint(), SaveOnNonFinite(), RandomState(), StopSignals()],
        },
    }
