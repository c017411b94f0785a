"""The LightningModule: a policy trained on preference pairs against the scores of its frozen reference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from bdpo_pl import embedded
from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.forward.fused_loss import LMHead
from bdpo_pl.forward.prefix_sharing import PrefixSharing, choose_layout
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.forward.router_loss import balancing_loss, routed
from bdpo_pl.losses import BalancedDPOLoss, PairScores, PreferenceLoss
from bdpo_pl.models.adapters import LoraOptions, attach_adapters, quantization_config
from bdpo_pl.models.before_training import BeforeTraining
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import (
    DTypeName,
    ModelSource,
    check_vocabulary,
    load_config,
    load_model,
)
from bdpo_pl.models.precision import resolve_dtype
from bdpo_pl.models.reach import frozen_names
from bdpo_pl.parallel.ranks import counts_its_data
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.reestimation import Reestimation
from bdpo_pl.scoring.reference import Reference, ReferenceChoice, ReferenceMode, choose_mode
from bdpo_pl.scoring.reference_sync import ReferenceSync, SyncOptions
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.checkpointed import CheckpointedModule
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.guards import check_first_loss, check_weights, require_finite_loss, say_unscored
from bdpo_pl.training.metrics import pair_metrics
from bdpo_pl.training.optim import LRSchedule, adamw, make_optimizer, with_schedule
from bdpo_pl.training.policy import build_policy
from bdpo_pl.training.reader import PolicyReader
from bdpo_pl.training.schedule_free import at_average
from bdpo_pl.training.start_checks import check_start
from bdpo_pl.training.steps import pair_scores


class PreferenceModule(CheckpointedModule):
    """Aligns a causal language model on preference pairs.

    Args:
        policy: model to align: a folder in the Hugging Face layout, a hub name, or `embedded` for the small model that
            ships with bdpo_pl.
        loss: loss, any `PreferenceLoss`. Default: Balanced DPO.
        reference: frozen reference model. Default: the policy before training.
        reference_mode: use of the reference: `precomputed` (scored once before training, cached, then freed), `live`
            (kept in memory) or `none`; `auto`: precomputed, or none if the loss reads no score and no `reference` is
            named.
        reference_dtype: dtype of the reference's weights; `auto`: the policy's.
        reestimate_every: number of optimiser steps after which comprehension is measured again, on the policy. Default:
            never; the reference's values are used for the whole run, as in the paper.
        scoring: options of the scoring pass.
        optimizer: optimiser; its weight_decay applies to matrices, never to norms and biases.
        lr_schedule: schedule of the learning rate after the warm-up: `cosine`, `linear` or `constant`.
        warmup_ratio: share of all optimiser steps in which the learning rate is warmed up.
        dtype: dtype of the policy's weights; `auto`: as the Trainer's precision requires (float32 unless it ends in
            `-true`).
        revision: git revision of a hub policy.
        attn_implementation: attention implementation, as in transformers. Default: the fastest for whole pairs that a
            comparison admits, otherwise transformers chooses.
        prefix_sharing: read each pair as one row [prompt | chosen | rejected], so that the prompt is read once. `auto`:
            if a comparison on real pairs shows no difference from two rows; `always`: stop with an error otherwise;
            `never`: a row for each response.
        lm_head: computation of the LM head: `fused` with the loss, a chunk of logits at a time; `logits`, as the model
            computes them; `auto`: fused if a comparison on real pairs shows no difference.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        activation_offloading: move activations to the host's memory until the backward pass, to save memory of the GPU;
            with gradient_checkpointing, the inputs of the layers alone.
        compile: backend for `torch.compile` of the layers (`inductor` is PyTorch's own). Default: not compiled. It
            takes about a minute, which pays off in long runs.
        lora: train only low-rank adapters. The reference is then the policy before training, and checkpoints contain
            the adapters alone.
        router_aux_loss: coefficient of the loss that balances the experts of a mixture, over the tokens of each batch;
            0: none.
        reference_sync: let the reference follow the policy at intervals (TR-DPO).
        trust_remote_code: run Python code that comes with the model. It runs with your permissions: read it first.

    Raises:
        InputError: an option is out of its range, or the loss needs scores that the reference does not provide.
    """

    def __init__(
        self,
        policy: str = EMBEDDED,
        loss: PreferenceLoss | None = None,
        reference: str | None = None,
        reference_mode: ReferenceChoice = "auto",
        reference_dtype: DTypeName = "auto",
        reestimate_every: int | None = None,
        scoring: ScoringOptions | None = None,
        optimizer: OptimizerCallable = adamw,
        lr_schedule: LRSchedule = "cosine",
        warmup_ratio: float = 0.1,
        dtype: DTypeName = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        prefix_sharing: PrefixSharing = "auto",
        lm_head: LMHead = "auto",
        gradient_checkpointing: bool = False,
        activation_offloading: bool = False,
        compile: str | None = None,
        lora: LoraOptions | None = None,
        router_aux_loss: float = 0.0,
        reference_sync: SyncOptions | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        source = ModelSource(embedded.model_folder(policy), revision, attn_implementation, trust_remote_code)
        sync = ReferenceSync(reference_sync or SyncOptions())
        super().__init__(loss or BalancedDPOLoss(), source, lora, Reestimation(reestimate_every), sync)
        if not 0.0 <= warmup_ratio < 1.0:
            raise InputError(f"model.warmup_ratio must be in [0, 1), got {warmup_ratio}")
        self.reference_source = self.source
        if reference is not None:
            self.reference_source = ModelSource(
                embedded.model_folder(reference), None, attn_implementation, trust_remote_code
            )
        # If the policy starts from an adapter, its base model is the reference only if the user names it.
        starts_adapted = lora is not None and lora.adapter is not None
        self.own_reference = self.reference_source == self.source and not (starts_adapted and reference is not None)
        moves = self.sync.options.every is not None
        self.reference_mode = choose_mode(reference_mode, self.loss, given=reference is not None, moves=moves)
        self.reference_dtype: DTypeName = reference_dtype
        self.scoring = scoring or ScoringOptions()
        self.optimizer = optimizer
        self.lr_schedule: LRSchedule = lr_schedule
        self.warmup_ratio = warmup_ratio
        self.dtype_name: DTypeName = dtype
        self.prefix_sharing: PrefixSharing = prefix_sharing
        self.lm_head = lm_head
        self.gradient_checkpointing = gradient_checkpointing
        self.activation_offloading = activation_offloading
        self.compile_backend = compile
        self.router_aux_loss = router_aux_loss
        self.quantization = None if lora is None or lora.quantize == "none" else lora.quantize
        self._reader = PolicyReader(lm_head, self.source.name)
        self._machine: Machine | None = None
        self._trained = False
        # Kept in a list so that `nn.Module` does not register it as a submodule before it becomes the policy.
        self._base: list[CausalLM] = []
        self._before: BeforeTraining | None = None

    # Setting up

    def setup(self, stage: str) -> None:
        """Read the pairs, check that model, data and loss fit together, and score the pairs."""
        splits = self.read_pairs()
        self.watch(splits.validation, splits.monitored)
        self._machine = machine = Machine.of(self.trainer)
        check_weights(self.loss, splits.tables["train"].weights)
        config = load_config(self.source)
        largest = [splits.pad_id, *(table.largest_id for table in splits.tables.values())]
        check_vocabulary(config, largest, self.source.name)
        if self.reference_source != self.source:
            check_vocabulary(load_config(self.reference_source), largest, self.reference_source.name)
        if self.reference is None:
            self.reference = self.make_reference(self.reference_mode, machine.precision)
            say_unscored(self.loss, self.reference_mode)
        self.reference.prepare(machine, splits, self.loss)
        if stage == "fit":
            self.reestimation.begin(self.global_step)
            self.sync.begin(self.global_step, self.reference.dtype)

    def make_reference(self, mode: ReferenceMode, precision: str) -> Reference:
        """Make the reference that the options describe; nothing is scored yet.

        Args:
            mode: use of the reference.
            precision: Lightning's name of the precision, which determines the dtype of the weights.

        Raises:
            InputError: the reference is the policy before training, but has another dtype.
        """
        dtype = self.dtype_of_reference(precision)
        adapted: Any = self if self.lora is not None and self.own_reference else None
        if adapted is not None and dtype != resolve_dtype(self.dtype_name, precision):
            raise InputError(
                f"model.reference_dtype is {self.reference_dtype}, but with LoRA the reference is the policy "
                "as it was before training, in the policy's own dtype; leave it out"
            )
        same = self.own_reference and self.lora is None and dtype == resolve_dtype(self.dtype_name, precision)
        load = self.base_model if same else None
        return Reference(self.reference_source, mode, dtype, self.scoring, self.prefix_sharing, adapted, load)

    def dtype_of_reference(self, precision: str) -> torch.dtype:
        """Return the dtype of the reference's weights under Lightning's `precision`."""
        return resolve_dtype(self.dtype_name if self.reference_dtype == "auto" else self.reference_dtype, precision)

    def read_pairs(self) -> PreferenceSplits:
        """Let the data module read the pairs for this policy and loss, once, if the options go together.

        Raises:
            InputError: two options contradict each other, a file cannot be read, or an earlier fit had other pairs.
        """
        data = self._data()
        check_start(self, self.trainer, data.max_length)
        needs = {"order_by_safety": self.loss.needs_safety, "single": self.loss.needs_labels}
        return self.keep_pairs(data.read(self.source, row_layout=lambda: self.row_layout, **needs))

    def configure_model(self) -> None:
        """Load the policy, once. The scoring pass has freed the reference before."""
        if self.policy is not None:
            return
        self.policy = build_policy(
            self.trainer, self, lambda: self.base_model(self.dtype_used, self.trainer.strategy.root_device)
        )
        self._base.clear()
        if self.lora is not None and self.own_reference and self.reference_mode == "live":
            self._before = BeforeTraining(self.policy, self.lora)
        if frozen_names(self.policy):
            # Checkpoints contain only trained weights; on_load_checkpoint makes sure that none of them is missing.
            self.strict_loading = False

    def base_model(self, dtype: torch.dtype, device: torch.device) -> CausalLM:
        """Load the whole model before training, once for reference and policy; quantised weights are on `device`."""
        if not self._base:
            model = load_model(self.source, dtype, quantization_config(self.lora), device)
            if self.lora is not None and self.lora.adapter is not None:
                attach_adapters(model, self.lora)
            self._base.append(model)
        return self._base[0]

    def before_training(self) -> AbstractContextManager[Any]:
        """Return a context in which the policy has its weights from before training."""
        assert self._before is not None
        return self._before.of(self.policy)

    @property
    def row_layout(self) -> RowLayout:
        """Layout in which the policy reads pairs, chosen at the first access with the policy on its device."""
        if self._layout is None:
            assert self.reference is not None
            tried = self.reference.layout_of(self.source, self.dtype_used, self.policy)
            self._layout = tried or choose_layout(
                self.policy,
                self.splits.tables["train"],
                self.prefix_sharing,
                name=self.source.name,
                attention=self.source.attn_implementation,
                pad_id=self.splits.pad_id,
                context=self.trainer.precision_plugin.forward_context,
            )
        return self._layout

    @property
    def dtype_used(self) -> torch.dtype:
        """Dtype of the policy's weights."""
        return resolve_dtype(self.dtype_name, str(self.trainer.precision))

    def configure_optimizers(self) -> Any:
        """Return the optimiser of the parameter groups, and the schedule over all steps of the run."""
        optimizer = make_optimizer(self.optimizer, self.policy, 1.0 if self.lora is None else self.lora.lr_ratio)
        steps = int(self.trainer.estimated_stepping_batches)
        return with_schedule(optimizer, self.lr_schedule, round(self.warmup_ratio * steps), steps)

    # Steps

    def on_fit_start(self) -> None:
        """Compare rows that ranks read together with rows read alone, if the strategy has them share rows."""
        self._reader.check_sharing(self.trainer, self.policy, self.splits, lambda: self.row_layout)

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Return (2, B) float32 log-probabilities of the chosen and of the rejected responses under the policy."""
        return response_logps(self.policy, batch.sequences).view(2, -1)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Let the reference follow the policy, and measure comprehension on the policy, if that is due."""
        self._sync()
        if self._machine is not None and self.reestimation.due(step := self.global_step):
            machine, layout = self._machine, self.row_layout
            with at_average(self.trainer.optimizers, self.policy):
                self.reestimation.update(step, self.policy, machine, self.splits, self.loss, self.scoring, layout)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the pairs' losses; over an optimiser step, these sums add up to the mean."""
        self._reader.choose_head(self.policy, self.loss, self.splits, self.row_layout)
        scores = self._scores(batch, "train")
        watch: AbstractContextManager[list[Any]] = routed(self.policy) if self.router_aux_loss else nullcontext([])
        with watch as decisions:
            logps, losses, loss = self._reader.losses(self.policy, self.loss, batch, scores, trained=True)
        if decisions:
            # A batch has the weight of its pairs.
            loss = loss + self.router_aux_loss * batch.pair_weight.sum() * balancing_loss(decisions, batch.sequences)
        require_finite_loss(self.trainer, loss, lambda: self._places(batch), batch_idx)
        self.observe(self.train_means, pair_metrics(self.loss, logps, scores, losses), batch)
        self.throughput.add(batch, counts_its_data(self.trainer))
        if self.global_step == 0 and batch_idx == 0 and self._starts_as_reference:
            assert self.loss.initial_value is not None
            check_first_loss(self.trainer, losses, self.loss.initial_value)
        return loss

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: PreferenceBatch, batch_idx: int) -> None:
        """Let the reference follow the policy, before a validation compares them."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._trained = True
        self._sync()

    def _sync(self) -> None:
        with at_average(self.trainer.optimizers if self.sync.due(self.global_step) else [], self.policy):
            self.sync.follow(self.global_step, self.policy, self.reference)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the metrics of each held-out set, and of the probe of training pairs."""
        split = self.splits.validation[dataloader_idx]
        scores = self._scores(batch, split)
        logps, losses, _ = self._reader.losses(self.policy, self.loss, batch, scores, trained=False)
        self.observe(self.means(split), pair_metrics(self.loss, logps, scores, losses), batch)

    def _scores(self, batch: PreferenceBatch, split: str) -> PairScores:
        """Return lengths and known scores of the pairs in `batch`, which are pairs of `split`."""
        assert self.reference is not None
        latest = self.reestimation.values(split, batch.pair_index)
        return pair_scores(batch, self.reference.scores(split, batch.pair_index), latest)

    def _places(self, batch: PreferenceBatch) -> list[str]:
        """Return file and row of each of the training pairs in `batch`."""
        return [self.splits.tables["train"].places[i] for i in batch.pair_index.tolist()]

    @property
    def _starts_as_reference(self) -> bool:
        """True if the first loss is known, because policy and reference are the same model before training."""
        own = self.own_reference and not self._trained
        return self.reference_mode != "none" and own and self.loss.initial_value is not None

    def _data(self) -> PreferenceDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PreferenceDataModule):
            raise InputError("PreferenceModule trains on a PreferenceDataModule: trainer.fit(module, datamodule)")
        return data
