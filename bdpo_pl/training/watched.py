"""Logging during training: means over pairs, throughput and the norm of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.data.held_out import HELD_OUT
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.models.precision import autocast_dtype
from bdpo_pl.parallel.ranks import counts_its_data
from bdpo_pl.reporting.progress import memory_used
from bdpo_pl.statistics import Interval
from bdpo_pl.training.flops import peak_flops, training_flops
from bdpo_pl.training.guards import finite_gradient_norm, let_the_scaler_unscale
from bdpo_pl.training.metrics import PairMeans, gaps
from bdpo_pl.training.schedule_free import at_average, stay_at_average
from bdpo_pl.training.throughput import Throughput


class WatchedModule(L.LightningModule):
    """A module that logs metrics of its batches, and clips gradients by the norm that it logs.

    Attributes:
        policy: model that is trained.
        loss: loss; what it measured on the training pairs is logged too.
        train_means: means over the training pairs since the last line of the log.
        evaluations: validation results by optimiser step; step 0 is the policy before training.
        unlogged: steps whose evaluation is not logged, because a resumed run measured it before its first step.
        intervals: 95 % intervals of these results, as far as they have one.
        changed_measures: traits that a resumed run changed, so that validations before it measured something else.
        throughput: measurement of tokens and FLOPs per second, and of padding.
        monitored: name of the first of several held-out sets, whose metrics are logged under it too.
    """

    def __init__(self, loss: PreferenceLoss) -> None:
        super().__init__()
        self.policy: Any = None
        self.loss = loss
        self.train_means = PairMeans()
        self.split_means = nn.ModuleDict()
        self.monitored = ""
        self.evaluations: dict[int, dict[str, float]] = {}
        self.unlogged: set[int] = set()
        self.changed_measures: list[str] = []
        self.intervals: dict[int, dict[str, Interval]] = {}
        self.throughput = Throughput()
        self._grad_norm = torch.zeros(())
        self._validating = ExitStack()

    def watch(self, splits: Sequence[str], monitored: str) -> None:
        """Prepare means for each split that is evaluated.

        Args:
            splits: names of the splits.
            monitored: name of the first of several held-out sets, whose metrics are logged under it too.
        """
        self.monitored = monitored
        for split in splits:
            if split not in self.split_means:
                self.split_means[split] = PairMeans()

    def means(self, split: str) -> PairMeans:
        """Return the means over the pairs of `split` in this validation."""
        means = self.split_means[split]
        assert isinstance(means, PairMeans)
        return means

    def observe(self, means: PairMeans, values: dict[str, Tensor], batch: PreferenceBatch) -> None:
        """Add the metrics of the pairs in `batch` to `means`, on one of the processes that read the same batch."""
        means.update(values, (batch.pair_weight > 0) & counts_its_data(self.trainer))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm, and stop before a step with a gradient that is not finite."""
        self._grad_norm = finite_gradient_norm(self.trainer, self.policy)
        self.log("train/grad_norm", self._grad_norm)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by value, or by the norm that `on_before_optimizer_step` has measured.

        Lightning would measure it again, and would refuse to clip for a fused optimiser under bf16-mixed.
        """
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in (None, "norm"):
            torch.nn.utils.clip_grad_value_(self.policy.parameters(), gradient_clip_val)
        elif self._grad_norm.device.type != "cpu" or self._grad_norm > gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.policy.parameters(), gradient_clip_val, self._grad_norm)

    def on_train_start(self) -> None:
        """Log what the loss measured on the training pairs, and start the measurement of throughput."""
        let_the_scaler_unscale(self.trainer)
        for logger in self.loggers:
            logger.log_hyperparams({f"loss.{name}": value for name, value in self.loss.state_dict().items()})
        self.throughput.flops = training_flops(self.policy)
        dtype = autocast_dtype(str(self.trainer.precision)) or self.policy.dtype
        self.throughput.peak = peak_flops(self.device, dtype)
        self.throughput.start()

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: PreferenceBatch, batch_idx: int) -> None:
        """Log the means over all pairs since the last time, every `log_every_n_steps` optimiser steps."""
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if not stepped or self.global_step % max(1, self.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return
        means = self.train_means.compute()
        self.train_means.reset()
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=name in ("loss", "margin", "accuracy"))
        for name, value in self.loss.state_dict().items():
            self.log(f"train/{name}", value)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        reduce = self.trainer.strategy.reduce
        for name, value in self.throughput.read(reduce, self.device, self.trainer.world_size).items():
            self.log(name, value, prog_bar=name == "train/tokens_per_second")
        peak = torch.tensor(memory_used() / 1e9, device=self.device, dtype=torch.float32)
        self.log("train/peak_memory_gb", reduce(peak, reduce_op="max"))

    def on_validation_start(self) -> None:
        """Stop the clock, because throughput does not include validation, and have the weights that are wanted."""
        self.throughput.pause()
        self._validating.enter_context(at_average(self.trainer.optimizers, self.policy))

    def on_validation_end(self) -> None:
        """Restart the clock, with the weights that are trained."""
        self._validating.close()
        self.throughput.resume()

    def on_fit_end(self) -> None:
        """Leave the weights that are wanted: those to be validated and exported."""
        stay_at_average(self.trainer.optimizers, self.policy)

    def on_validation_epoch_end(self) -> None:
        """Log the means of each split, and the gap between them, which measures overfitting."""
        values: dict[str, float] = {}
        intervals: dict[str, Interval] = {}
        for split in self.split_means:
            means = self.means(split)
            called = [split] + ([f"{split}/{self.monitored}"] if split == HELD_OUT and self.monitored else [])
            computed = means.compute()
            for prefix in called:
                values |= {f"{prefix}/{name}": value for name, value in computed.items()}
                intervals |= {f"{prefix}/{name}": value for name, value in means.intervals.items()}
            means.reset()
        for name, gap in gaps(values, intervals).items():
            values[name] = gap.value
            intervals |= {name: gap} if gap.bounded else {}
        if self.trainer.sanity_checking and _is_cut(self.trainer):
            # `num_sanity_val_steps` leaves pairs out, which later validations measure: not to be compared with them.
            for split in self.split_means:
                self.means(split).reset()
            return
        if not self.trainer.sanity_checking:
            self.unlogged.discard(self.global_step)
        elif self.global_step > 0 and self.global_step not in self.evaluations:
            self.unlogged.add(self.global_step)
        self.evaluations[self.global_step] = values
        self.intervals[self.global_step] = intervals
        # The means are the same on every rank; sync_dist only tells Lightning so.
        self.log_dict(values, sync_dist=True)


def _is_cut(trainer: L.Trainer) -> bool:
    """Return true if the validation before training has fewer batches than one during training."""
    counts = zip(trainer.num_sanity_val_batches, trainer.num_val_batches, strict=True)
    return any(few < all_ for few, all_ in counts)
