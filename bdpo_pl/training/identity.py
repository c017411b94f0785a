"""The identity of a run, saved in its checkpoints, so that a resumed run cannot silently become a different one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bdpo_pl.errors import InputError
from bdpo_pl.models.checkpoint import RUN
from bdpo_pl.training.checkpoints import is_amid_accumulation, require_same_checkpoint
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.traits import (
    HELD_OUT_TRAITS,
    OPTIMIZER,
    SAFETY,
    VALIDATED,
    Trait,
    change_measures,
    describe_run,
)

MUST_AGREE = ("data", "tokenizer", "template", "policy", "reference", "loss")
"""Traits that define a run; a run is not resumed if one of them differs."""

_ORDER = {"batches", "seed"}
"""Traits that determine the order of the pairs: if one differs, the skipped batches contain other pairs."""

_ALLOWED_AS = {SAFETY: "data"}
"""Traits that define a run as parts of another one, under whose name they are allowed."""

_NEWER = (SAFETY, *HELD_OUT_TRAITS[1:], VALIDATED, "router_aux_loss", "gradient_clip_algorithm")
"""First words of traits that checkpoints of earlier versions lack: compared only where both runs have them."""


@dataclass
class ResumeOptions:
    """Differences between a resumed run and the run of its checkpoint.

    Args:
        allow: differences that are allowed, as `[loss, data]`: data, tokenizer, template, policy, reference, loss.
            Other differences are always allowed, and reported when the run is resumed.

    Raises:
        InputError: a name is none of these.
    """

    allow: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.allow) - set(MUST_AGREE))
        if unknown:
            raise InputError(
                f"resume.allow names {', '.join(unknown)}; what a resume stops for are {', '.join(MUST_AGREE)}"
            )


def check_resume(
    saved: Mapping[str, Mapping[str, Any]], now: Mapping[str, Trait], allow: Sequence[str], batches_done: int
) -> set[str]:
    """Compare the run of a checkpoint with this one, and log every difference.

    Args:
        saved: traits in the checkpoint.
        now: traits of this run.
        allow: names of allowed differences.
        batches_done: number of finished batches in the checkpoint's epoch.

    Returns:
        Names of the traits that differ.

    Raises:
        InputError: a trait differs that must agree and is not allowed, or the optimiser is of another class.
    """
    both = now.keys() & saved.keys()
    compared = [name for name in dict.fromkeys([*now, *saved]) if name in both or not name.startswith(_NEWER)]
    names = [name for name in compared if _value(saved.get(name)) != _value_of(now.get(name))]
    lines = {name: f"{name}: {_shown(saved.get(name))} → {_shown_of(now.get(name))}" for name in names}
    if OPTIMIZER in names:
        raise InputError(
            f"the checkpoint holds the state of another optimiser ({lines[OPTIMIZER]}), which the new one cannot take "
            "up: resume with model.optimizer as it was, or begin a new run from the exported model"
        )
    defining = {name: _ALLOWED_AS.get(name, name) for name in names if _ALLOWED_AS.get(name, name) in MUST_AGREE}
    refused = {name: allowed_as for name, allowed_as in defining.items() if allowed_as not in allow}
    if refused:
        raise InputError(
            "the checkpoint belongs to another run: "
            + "; ".join(lines[name] for name in refused)
            + ". Resume it with the data and options it was trained with, or, to continue with the change, add "
            f"--resume.allow '[{', '.join(sorted({*allow, *refused.values()}))}]'"
        )
    if names:
        rank_zero_info("The resumed run differs from the run of its checkpoint:")
    for name in names:
        if name in defining:
            what = "allowed"
        elif name in _ORDER:
            skipped = f", so the {batches_done} batches skipped as done are other pairs" if batches_done else ""
            what = f"another order{skipped}"
        else:
            what = "takes effect from here on"
        rank_zero_info(f"  {lines[name]} ({what})")
    return set(names)


class RunIdentity(L.Callback):
    """Saves the traits of the run in its checkpoints, and compares them when it is resumed, before the scoring pass.

    Lightning restores learning rate and schedule from the checkpoint; if the user gives others, they are applied here.

    Args:
        resume_from: checkpoint from which the run is resumed, if any.
        allow: allowed differences; see `ResumeOptions`.
    """

    def __init__(self, resume_from: str | None = None, allow: Sequence[str] = ()) -> None:
        self.resume_from = resume_from
        self.allow = tuple(allow)
        self.traits: dict[str, Trait] = {}
        self._compared = False
        self.differs: set[str] = set()
        self._options: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have the pairs read, describe the run, and compare it with the checkpoint's, before any pair is scored."""
        if stage != "fit" or self.traits:
            return
        require_same_checkpoint(trainer, self.resume_from, RUN)
        assert isinstance(pl_module, PreferenceModule)
        pl_module.read_pairs()
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.traits = describe_run(trainer, pl_module, data)
        if self.resume_from is not None and Path(self.resume_from).is_file():
            # Its tensors remain on disk.
            checkpoint = torch.load(self.resume_from, map_location="cpu", mmap=True, weights_only=True)
            pl_module.check_reference_sync(checkpoint)
            self._compare(pl_module, checkpoint)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the user's options of the optimiser before the checkpoint replaces them."""
        self._options = [
            {name: value for name, value in group.items() if name != "params"}
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply the optimiser's options and the schedule that the user gives now."""
        changed = {name.removeprefix("optimizer.") for name in self.differs if name.startswith("optimizer.")}
        schedule = {"lr_schedule", "warmup_ratio", "max_epochs", "max_steps", "limit_train_batches"} & self.differs
        if not (changed or schedule):
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # The scheduler computes its rates from this one.
        changed |= {"initial_lr"} if "lr" in changed else set()
        for group, given in zip(groups, self._options, strict=True):
            group.update({name: given[name] for name in changed if name in given})
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                continue
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the traits of the run and its validations so far, the first of which the final table shows."""
        assert isinstance(pl_module, PreferenceModule)
        checkpoint[RUN] = {
            "traits": {name: trait.to_plain() for name, trait in self.traits.items()},
            "evaluations": {step: dict(values) for step, values in pl_module.evaluations.items()},
            "batches_done": trainer.datamodule.state_dict()["batches_done"],  # type: ignore[attr-defined]
            "amid_accumulation": is_amid_accumulation(trainer),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the validations that those of this run compare with; compare the runs if that was not possible."""
        assert isinstance(pl_module, PreferenceModule)
        self._compare(pl_module, checkpoint)
        earlier = checkpoint.get(RUN, {}).get("evaluations", {})
        if not pl_module.changed_measures:
            pl_module.evaluations = {**earlier, **pl_module.evaluations}
            return
        # The module has taken up those before training from its own part of the checkpoint.
        pl_module.evaluations.pop(0, None)
        if earlier:
            rank_zero_info(
                "The validations before the stop measured something else "
                f"({', '.join(pl_module.changed_measures)}): they are not compared with those that follow"
            )

    def _compare(self, module: PreferenceModule, checkpoint: Mapping[str, Any]) -> None:
        if self._compared:
            return
        self._compared = True
        saved = checkpoint.get(RUN)
        if saved is None:
            rank_zero_info(
                "The checkpoint was written by an earlier version and does not record the data, loss and options of "
                "its run, so they cannot be compared with those of this run"
            )
            return
        self.differs = check_resume(saved["traits"], self.traits, self.allow, saved["batches_done"])
        module.changed_measures = change_measures(self.differs)
        if saved.get("amid_accumulation"):
            rank_zero_warn(
                "The checkpoint was written in the middle of an accumulation and does not contain its gradients: the "
                "run continues without them. last.ckpt is written between steps, and a run resumes from it exactly"
            )


def _value(saved: Mapping[str, Any] | None) -> Any:
    return None if saved is None else saved["value"]


def _value_of(trait: Trait | None) -> Any:
    return None if trait is None else trait.value


def _shown(saved: Mapping[str, Any] | None) -> str:
    return "not given" if saved is None else str(saved["shown"])


def _shown_of(trait: Trait | None) -> str:
    return "not given" if trait is None else trait.shown
