"""The LightningModule: a policy trained on preference pairs against the scores of its frozen reference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from bdpo_pl import embedded
from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.forward.fused_loss import LMHead, choose_head
from bdpo_pl.forward.prefix_sharing import PrefixSharing, choose_layout, probe_documents
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.forward.router_loss import balancing_loss, check_router, routed
from bdpo_pl.losses import BalancedDPOLoss, PairScores, PreferenceLoss
from bdpo_pl.models.adapters import LoraOptions, attach_adapters, is_adapter, quantization_config
from bdpo_pl.models.before_training import BeforeTraining
from bdpo_pl.models.loading import (
    DTypeName,
    ModelSource,
    check_vocabulary,
    check_window,
    compile_layers,
    load_config,
    load_model,
    resolve_dtype,
)
from bdpo_pl.models.reach import frozen_names
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.reestimation import Reestimation
from bdpo_pl.scoring.reference import Reference, ReferenceChoice, ReferenceMode, choose_mode
from bdpo_pl.scoring.reference_sync import ReferenceSync, SyncOptions
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.checkpoints import require_same_policy
from bdpo_pl.training.datamodule import VALIDATION_SPLITS, PreferenceDataModule
from bdpo_pl.training.guards import check_first_loss, check_weights, require_finite_loss, say_unscored
from bdpo_pl.training.metrics import pair_metrics
from bdpo_pl.training.optim import LRSchedule, adamw, lr_lambda, parameter_groups, scale_rates, warn_of_lost_updates
from bdpo_pl.training.policy import build_policy
from bdpo_pl.training.steps import fused_losses, pair_scores, plain_losses
from bdpo_pl.training.watched import WatchedModule


class PreferenceModule(WatchedModule):
    """Aligns a causal language model on preference pairs.

    Args:
        policy: model to align: a folder in the Hugging Face layout, a hub name, or `embedded` for the small one that
            ships with bdpo_pl.
        loss: any `PreferenceLoss`; default Balanced DPO.
        reference: frozen reference; default the policy as it is before training.
        reference_mode: `precomputed` (scored once before training, cached, then not in memory), `live` or `none`;
            `auto`: precomputed, or none where the loss reads no score and no `reference` is named.
        reference_dtype: of the reference's weights; `auto`: the policy's.
        reestimate_every: measure comprehension anew, on the policy, each so many optimiser steps; default never: the
            reference's holds throughout, as in the paper.
        scoring: of the scoring pass.
        optimizer: takes parameter groups; matrices decay by its weight_decay, norms and biases never.
        lr_schedule: `cosine`, `linear` or `constant`, after the warm-up.
        warmup_ratio: share of all optimiser steps that warms the learning rate up.
        dtype: of the policy's weights; `auto`: as the Trainer's precision wants (float32 unless it ends in `-true`).
        revision: git revision of a hub policy.
        attn_implementation: as in transformers; default its own choice.
        prefix_sharing: read each pair as one row [prompt | chosen | rejected], the prompt once. `auto`: where a
            comparison on the first pairs finds no difference from two rows; `always`: or stop; `never`.
        lm_head: `fused` with the loss, a chunk of logits at a time; `logits`, as the model computes them; `auto`: fused
            where a comparison on the longest pair finds no difference.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        compile: backend for `torch.compile` of the layers (`inductor` is PyTorch's own); default: not compiled. Worth
            its minute of compilation in long runs.
        lora: train low-rank adapters and nothing else; the reference is then the policy as it was before, and
            checkpoints hold the adapters alone.
        router_aux_loss: factor of the loss that balances the experts of a mixture, over the tokens of each batch; 0:
            none.
        reference_sync: have the reference follow the policy (TR-DPO).
        trust_remote_code: run Python code that comes with the model. It runs with your permissions: read it first.

    Raises:
        InputError: options out of range, or a loss that needs what the reference does not give.
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
        compile: str | None = None,
        lora: LoraOptions | None = None,
        router_aux_loss: float = 0.0,
        reference_sync: SyncOptions | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(loss or BalancedDPOLoss())
        if not 0.0 <= warmup_ratio < 1.0:
            raise InputError(f"model.warmup_ratio must be in [0, 1), got {warmup_ratio}")
        self.source = ModelSource(_resolve(policy), revision, attn_implementation, trust_remote_code)
        self.reference_source = self.source
        if reference is not None:
            self.reference_source = ModelSource(_resolve(reference), None, attn_implementation, trust_remote_code)
        # A policy that starts from an adapter has its base model as the reference only where that is named.
        starts_adapted = lora is not None and lora.adapter is not None
        self.own_reference = self.reference_source == self.source and not (starts_adapted and reference is not None)
        self.sync = ReferenceSync(reference_sync or SyncOptions())
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
        self.compile_backend = compile
        self.lora = lora
        self.router_aux_loss = router_aux_loss
        self.quantization = None if lora is None or lora.quantize == "none" else lora.quantize
        if lora is not None:
            # Checkpoints hold the adapters alone; on_load_checkpoint sees to it that they hold all of them.
            self.strict_loading = False
        self.reference: Reference | None = None
        self.reestimation = Reestimation(reestimate_every)
        self._fused: bool | None = None
        self._layout: RowLayout | None = None
        self._machine: Machine | None = None
        self._splits: PreferenceSplits | None = None
        # In a list, so that it is no part of this module before it is its policy.
        self._base: list[nn.Module] = []
        self._before: BeforeTraining | None = None

    # Setting up

    def setup(self, stage: str) -> None:
        """Have the pairs read, check that model, data and loss fit each other, and score the pairs."""
        splits = self.read_pairs()
        self._machine = machine = Machine.of(self.trainer)
        check_weights(self.loss, splits.tables["train"].weights)
        config = load_config(self.source)
        check_window(config, splits.truncation.max_length, self.source.name)
        largest = [splits.pad_id, *(table.largest_id for table in splits.tables.values())]
        check_vocabulary(config, largest, self.source.name)
        check_router(config, self.router_aux_loss, self.source.name)
        if self.reference_source != self.source:
            check_vocabulary(load_config(self.reference_source), largest, self.reference_source.name)
        if self.reference is None:
            self.reference = self.make_reference(self.reference_mode, machine.precision)
            say_unscored(self.loss, self.reference_mode)
        self.reference.check_machine(machine)
        self.reference.check_fits(self.loss)
        self.sync.check_fits(machine, self.reference_mode, self.own_reference, self.lora is not None)
        self.reestimation.check_fits(machine, self.loss, self.scoring)
        self.reference.prepare(machine, splits, self.loss)

    def make_reference(self, mode: ReferenceMode, precision: str) -> Reference:
        """Make the reference that the options describe, with nothing scored yet.

        Args:
            mode: how it is kept.
            precision: Lightning's name of the precision, which says in which dtype weights are held.

        Raises:
            InputError: its dtype is not the policy's, where it is the policy as it was before training.
        """
        name = self.dtype_name if self.reference_dtype == "auto" else self.reference_dtype
        dtype = resolve_dtype(name, precision)
        adapted: Any = self if self.lora is not None and self.own_reference else None
        if adapted is not None and dtype != resolve_dtype(self.dtype_name, precision):
            raise InputError(
                f"model.reference_dtype is {self.reference_dtype}, but with LoRA the reference is the policy "
                "as it was before training, in the policy's own dtype; leave it out"
            )
        same = self.own_reference and self.lora is None and dtype == resolve_dtype(self.dtype_name, precision)
        load = self.base_model if same else None
        return Reference(self.reference_source, mode, dtype, self.scoring, self.prefix_sharing, adapted, load)

    def read_pairs(self) -> PreferenceSplits:
        """Have the data module read the pairs for this policy and loss, once."""
        data = self._data()
        self._splits = data.read(
            self.source, order_by_safety=self.loss.needs_safety, row_layout=lambda: self.row_layout
        )
        return self._splits

    def configure_model(self) -> None:
        """Load the policy, once; by now the scoring pass has let go of the reference."""
        if self.policy is not None:
            return
        self.policy = build_policy(
            self.trainer,
            self.source,
            self.dtype_used,
            lambda: self.base_model(self.dtype_used, self.trainer.strategy.root_device),
            lora=self.lora,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        self._base.clear()
        if self.lora is not None and self.own_reference and self.reference_mode == "live":
            self._before = BeforeTraining(self.policy, self.lora)
        if frozen_names(self.policy):
            # Checkpoints hold what is trained; on_load_checkpoint sees to it that they hold all of it.
            self.strict_loading = False
        if self.compile_backend is not None:
            compile_layers(self.policy, self.compile_backend)

    def base_model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Load the whole model as it is before training, once for reference and policy; quantised, on `device`."""
        if not self._base:
            model = load_model(self.source, dtype, quantization_config(self.lora), device)
            if self.lora is not None and self.lora.adapter is not None:
                attach_adapters(model, self.lora)
            self._base.append(model)
        return self._base[0]

    def before_training(self) -> AbstractContextManager[Any]:
        """The policy as it was before training, while the context is open."""
        assert self._before is not None
        return self._before.of(self.policy)

    @property
    def row_layout(self) -> RowLayout:
        """How the policy reads pairs: tried out when first asked for, with the policy on its device."""
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
        """The dtype that the policy's weights are held in."""
        return resolve_dtype(self.dtype_name, str(self.trainer.precision))

    def configure_optimizers(self) -> Any:
        """The optimiser on its parameter groups, and the schedule over all of the run's steps."""
        ratio = 1.0 if self.lora is None else self.lora.lr_ratio
        optimizer = scale_rates(self.optimizer(parameter_groups(self.policy, ratio)))
        warn_of_lost_updates(optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = lr_lambda(self.lr_schedule, round(self.warmup_ratio * steps), steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Steps

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """(2, B) float32 log-probabilities of the chosen and of the rejected responses under the policy."""
        return response_logps(self.policy, batch.sequences).view(2, -1)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Have the reference follow the policy, and measure comprehension on it, where that is due."""
        self.sync.follow(self.global_step, self.policy, self.reference)
        if self.reestimation.due(self.global_step):
            assert self._machine is not None
            self.reestimation.update(
                self.global_step, self.policy, self._machine, self.splits, self.loss, self.scoring, self.row_layout
            )

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Weighted sum of the pairs' losses, which over an optimiser step is their mean."""
        if self._fused is None:
            probe = lay_out(
                probe_documents(self.splits.tables["train"], self.policy), self.row_layout, self.splits.pad_id
            )
            self._fused = choose_head(
                self.policy, probe.to(self.device), self.lm_head, self.source.name, objection=self.loss.not_fused
            )
        scores = self._scores(batch, "train")
        watch: AbstractContextManager[list[Any]] = routed(self.policy) if self.router_aux_loss else nullcontext([])
        with watch as decisions:
            compute = fused_losses if self._fused else plain_losses
            logps, losses, loss = compute(self.policy, self.loss, batch, scores)
        if decisions:
            # A batch counts as much as its pairs do.
            loss = loss + self.router_aux_loss * batch.pair_weight.sum() * balancing_loss(decisions, batch.sequences)
        places = [self.splits.tables["train"].places[i] for i in batch.pair_index.tolist()]
        require_finite_loss(self.trainer, loss, places, batch_idx)
        self.train_means.update(pair_metrics(self.loss, logps, scores, losses), batch.pair_weight > 0)
        self.throughput.add(batch.num_tokens)
        if self.global_step == 0 and batch_idx == 0 and self._starts_as_reference:
            assert self.loss.initial_value is not None
            check_first_loss(self.trainer, losses, self.loss.initial_value)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        """Have the reference follow the policy, before anything is validated against it."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.sync.follow(self.global_step, self.policy, self.reference)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the metrics of held-out pairs, and of the probe of training pairs."""
        split = VALIDATION_SPLITS[dataloader_idx]
        scores = self._scores(batch, split)
        logps, losses, _ = plain_losses(self.policy, self.loss, batch, scores)
        self.means(split).update(pair_metrics(self.loss, logps, scores, losses), batch.pair_weight > 0)

    def _scores(self, batch: PreferenceBatch, split: str) -> PairScores:
        """What is known of the pairs at `batch` of `split`."""
        assert self.reference is not None
        latest = self.reestimation.values(split, batch.pair_index)
        return pair_scores(batch, self.reference.scores(split, batch.pair_index), latest)

    @property
    def _starts_as_reference(self) -> bool:
        """Whether the loss of every pair is known at the start, policy and reference being one model."""
        return self.reference_mode != "none" and self.own_reference and self.loss.initial_value is not None

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which model the weights belong to, and keep what was measured on the way."""
        checkpoint["bdpo_pl"] = {
            "policy": self.source.name,
            "revision": self.source.revision,
            "reestimation": self.reestimation.state_dict(),
            "loss": self.loss.state_dict(),
            **({"lora": None} if self.lora is None else self.lora.to_saved()),
            # Over all ranks: what the next log line will be the mean of.
            "train_means": self.train_means.joined(self.trainer.strategy.reduce),
            # What the closing table of a resumed run begins with.
            "before": self.evaluations.get(0, {}),
        }
        if "optimizer_states" in checkpoint:
            checkpoint["bdpo_pl"]["reference_sync"] = self.sync.state_dict(self.reference)
        trained = self._trained_names()
        # Where the weights are split, only rank 0 has them.
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model.

        Raises:
            InputError: the checkpoint was written for another policy.
        """
        saved = checkpoint.get("bdpo_pl", {})
        require_same_policy(
            saved, self.source.name, self.lora, self._trained_names() <= checkpoint["state_dict"].keys()
        )
        self.loss.load_state_dict(saved.get("loss", {}))
        self.sync.load_state_dict(saved.get("reference_sync", {}), self.reference)
        if "reestimation" in saved:
            self.reestimation.load_state_dict(saved["reestimation"])
        if saved.get("before"):
            self.evaluations.setdefault(0, saved["before"])
        if "train_means" in saved and self.trainer.is_global_zero:
            self.train_means.take_up(saved["train_means"])

    def _trained_names(self) -> set[str]:
        """Names in a checkpoint's state: everything that is trained, with LoRA the adapters."""
        if self.lora is None:
            # What text never reaches is as it was, and FSDP2 does not gather it.
            return set(self.state_dict()) - {f"policy.{name}" for name in frozen_names(self.policy)}
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad or is_adapter(name)}

    @property
    def splits(self) -> PreferenceSplits:
        """The pairs of all splits, once `setup` has had them read."""
        if self._splits is None:
            raise RuntimeError("the pairs are not read yet: trainer.fit(module, datamodule) has them read")
        return self._splits

    def _data(self) -> PreferenceDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PreferenceDataModule):
            raise InputError("PreferenceModule trains on a PreferenceDataModule: trainer.fit(module, datamodule)")
        return data


def _resolve(name: str) -> str:
    return str(embedded.MODEL_DIR) if name == EMBEDDED else name
