"""The disk space that a run will need, reported before its first step."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from bdpo_pl.reporting.format import size
from bdpo_pl.training.callbacks import LastCheckpoint
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.optimizer_state import state_bytes
from bdpo_pl.training.optimizers import mark_kinds
from bdpo_pl.training.parameter_counts import count_matrices, num_weights


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run will write.

    Attributes:
        last: size of `last.ckpt`, with policy and optimiser, and with a reference that follows the policy.
        best: size of one best checkpoint.
        kept: number of best checkpoints that are kept; None: all of them.
        export: size of the exported model.
    """

    last: int
    best: int
    kept: int | None
    export: int

    @property
    def total(self) -> int:
        """Bytes at the end of the run, counting one best checkpoint if all are kept.

        A checkpoint is written before the one that it replaces is removed, so one more is counted.
        """
        return (
            self.last
            + self.best * (self.kept if self.kept is not None else 1)
            + self.export
            + max(self.last, self.best)
        )

    def sentence(self, free: int) -> str:
        """Describe the plan in one line, with the free space."""
        many = {None: "each ", 1: "", 0: "none of "}.get(self.kept, f"{self.kept} × ")
        return (
            f"On the disk: last.ckpt {size(self.last)}, best checkpoint {many}{size(self.best)}, exported model "
            f"{size(self.export)}; {size(free)} are free"
        )


class SaysDisk(L.Callback):
    """Reports before the first step what the run will write, and warns if the disk is too small.

    Args:
        export: true if the model is exported at the end.
    """

    def __init__(self, export: bool) -> None:
        self.export = export

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the plan."""
        assert isinstance(pl_module, PreferenceModule)
        plan = plan_disk(trainer, pl_module, self.export)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        here = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(here).free
        rank_zero_info(plan.sentence(free))
        if plan.total > free:
            rank_zero_warn(
                f"the disk of {folder} has {size(free)} free, but the run will need {size(plan.total)}: free some, set "
                "trainer.default_root_dir to another disk, or lower checkpoint.save_top_k"
            )


def plan_disk(trainer: L.Trainer, module: PreferenceModule, export: bool) -> DiskPlan:
    """Compute the plan of a run whose policy is loaded.

    Args:
        trainer: Trainer with its checkpoint callbacks.
        module: module of the run.
        export: true if the model is exported at the end.
    """
    parameters = list(module.policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in trained)
    mark_kinds(module.policy)
    hidden, uneven = count_matrices(trained)
    others = sum(p.numel() for p in trained) - hidden
    optimizer = state_bytes(module.optimizer, hidden, others, trained[0].dtype, uneven)
    state = round(weights + optimizer)
    if module.sync.options.every is not None and module.reference is not None and module.reference.model is not None:
        state += sum(p.numel() * p.element_size() for p in module.reference.model.parameters())
    best = 0
    kept: int | None = 0
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and not isinstance(callback, LastCheckpoint):
            best = weights if callback.save_weights_only else state
            kept = None if callback.save_top_k == -1 else callback.save_top_k
    whole = sum(num_weights(p) * _exported_width(p, module) for p in parameters)
    return DiskPlan(state, best, kept, whole if export else 0)


def _exported_width(parameter: Tensor, module: PreferenceModule) -> int:
    """Return the bytes of an exported weight: quantised ones are exported as they were before."""
    packed = getattr(parameter, "quant_state", None) is not None
    return module.dtype_used.itemsize if packed else parameter.element_size()
