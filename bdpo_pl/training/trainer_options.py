"""Options and callbacks of Lightning's Trainer that a run would take without a word, without doing what they say.

They are refused where a run starts, for the command and for callers in Python alike.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from bdpo_pl.errors import InputError
from bdpo_pl.training.callbacks import LastCheckpoint

_UNFIT: dict[type[Callback], str] = {
    StochasticWeightAveraging: "copies the module before the policy is loaded, so it would average nothing; for an "
    "average of the weights take --optim schedule_free_adamw --model.lr_schedule constant",
    BatchSizeFinder: "changes the size of the batches after the schedule of the learning rate is laid over the steps "
    "of another size; set data.batch_size, and see with --dry_run true what memory it takes",
    LearningRateFinder: "looks for a learning rate in the module, and it is the optimiser's; set model.optimizer.lr",
    GradientAccumulationScheduler: "changes the number of batches in a step, and the weights of the pairs and the "
    "schedule of the learning rate are made for one number; set trainer.accumulate_grad_batches",
}
_BETTER = {"loss": "min", "margin": "max", "accuracy": "max", "logp_accuracy": "max"}


def _is_validated(monitor: str) -> bool:
    """Return true for the name of a metric that only validations measure."""
    return monitor.startswith(("held_out/", "train_probe/", "gap/", "safety/"))


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse options and callbacks of `trainer` that would have no effect, or another one than they say.

    Raises:
        InputError: there is one; the message says what to set instead.
    """
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _check_least(trainer)
    if trainer._val_check_time_interval is not None and trainer.num_devices * trainer.num_nodes > 1:  # type: ignore[attr-defined]
        raise InputError(
            "trainer.val_check_interval is a time, which each rank would take from its own clock, so that one would "
            "validate while another trains: set it to a number of batches, or to a share of an epoch"
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    keeps_last = any(isinstance(callback, LastCheckpoint) for callback in callbacks)
    for callback in callbacks:
        for kind, reason in _UNFIT.items():
            if isinstance(callback, kind):
                raise InputError(f"the callback {type(callback).__name__} {reason}")
        if isinstance(callback, ModelCheckpoint) and not isinstance(callback, LastCheckpoint):
            _check_checkpoint(callback, trainer, keeps_last)
        elif isinstance(callback, EarlyStopping) and trainer.limit_val_batches == 0 and _is_validated(callback.monitor):
            raise InputError(
                f"EarlyStopping has the monitor {callback.monitor}, which validations measure, and there are none: "
                "leave out trainer.limit_val_batches 0"
            )
        elif isinstance(callback, EarlyStopping) and callback.mode != (wanted := better(callback.monitor)) and wanted:
            raise InputError(
                f"EarlyStopping has mode {callback.mode}, by which {callback.monitor} would stop the run as it gets "
                f"better; set its mode to {wanted}"
            )


def better(monitor: str) -> str | None:
    """Return the mode, `min` or `max`, in which a better run has a better `monitor`; None if that is a matter of taste.

    Args:
        monitor: name of a logged metric.
    """
    split, _, name = monitor.rpartition("/")
    if split == "gap":
        return "min"
    return _BETTER.get(name) if split.split("/")[0] in ("train", "train_probe", "held_out") else None


def _check_least(trainer: L.Trainer) -> None:
    """Raise `InputError` if epochs or steps end the run before its least number of them."""
    for unit in ("epochs", "steps"):
        least, most = getattr(trainer, f"min_{unit}") or 0, getattr(trainer, f"max_{unit}")
        if most not in (None, -1) and least > most:
            raise InputError(
                f"trainer.min_{unit} is {least}, but the run ends after {most}, by trainer.max_{unit}: raise that, or "
                f"leave trainer.min_{unit} out"
            )


def _check_checkpoint(callback: ModelCheckpoint, trainer: L.Trainer, keeps_last: bool) -> None:
    """Raise `InputError` if `callback` would keep the worst weights, none, or others than it says."""
    monitor = callback.monitor or ""
    if (wanted := better(monitor)) not in (None, callback.mode):
        raise InputError(
            f"checkpoint.mode is {callback.mode}, by which {monitor} would choose the worst; set checkpoint.mode "
            f"{wanted}"
        )
    if keeps_last and callback.dirpath is None and (callback.save_last or callback.filename == LastCheckpoint.NAME):
        option = "save_last" if callback.save_last else f"filename {callback.filename}"
        raise InputError(
            f"checkpoint.{option} would write other content into last.ckpt, from which the run is resumed, and which "
            "is written at validations and at the end in any case: leave it out, or set checkpoint.dirpath to another "
            "folder"
        )
    by_time = callback._train_time_interval is not None
    if callback.save_top_k != 0 and _is_validated(monitor) and (by_time or callback._every_n_train_steps > 0):
        raise InputError(
            f"checkpoint.{'train_time_interval' if by_time else 'every_n_train_steps'} would choose between weights by "
            f"the {monitor} of earlier ones, which the validation before had: leave it out, and weights are chosen at "
            "every validation (trainer.val_check_interval); or keep all of them with --checkpoint.monitor null "
            "--checkpoint.save_top_k -1"
        )
    epochs = trainer.max_epochs
    if epochs is not None and 0 < epochs < callback._every_n_epochs and callback.save_top_k != 0:
        raise InputError(
            f"checkpoint.every_n_epochs is {callback._every_n_epochs}, but the run has {epochs} of trainer.max_epochs, "
            "so no checkpoint would be kept: lower it, or leave it out"
        )
