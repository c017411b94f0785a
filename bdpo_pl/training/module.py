"""The LightningModule: a policy trained on preference pairs against the scores of its frozen reference."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from bdpo_pl import embedded
from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError, NonFiniteError
from bdpo_pl.forward.fused_loss import fused_preference_loss, why_not_fused
from bdpo_pl.forward.masks import set_attention
from bdpo_pl.forward.prefix_sharing import PrefixSharing, choose_layout, probe_documents
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.losses import BalancedDPOLoss, PairScores, PreferenceLoss
from bdpo_pl.models.adapters import LoraOptions, quantization_config
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
from bdpo_pl.scoring.reestimation import Reestimation
from bdpo_pl.scoring.reference import Reference, ReferenceChoice, choose_mode
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.datamodule import VALIDATION_SPLITS, PreferenceDataModule
from bdpo_pl.training.metrics import PairMeans, pair_metrics
from bdpo_pl.training.optim import LRSchedule, adamw, lr_lambda, parameter_groups
from bdpo_pl.training.policy import build_policy

LMHead = Literal["auto", "fused", "logits"]

# A weight of 0.02, a usual size, is 6e-5 from its next neighbour in bfloat16; a step of Adam is about the rate.
_SMALLEST_HALF_RATE = 1e-5


class PreferenceModule(L.LightningModule):
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
        lora: train low-rank adapters and nothing else; the reference is then the policy without them, and checkpoints
            hold them alone.
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
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= warmup_ratio < 1.0:
            raise InputError(f"model.warmup_ratio must be in [0, 1), got {warmup_ratio}")
        self.source = ModelSource(_resolve(policy), revision, attn_implementation, trust_remote_code)
        self.reference_source = self.source
        if reference is not None:
            self.reference_source = ModelSource(_resolve(reference), None, attn_implementation, trust_remote_code)
        self.loss = loss or BalancedDPOLoss()
        self.reference_mode = choose_mode(reference_mode, self.loss, given=reference is not None)
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
        self.quantization = None if lora is None or lora.quantize == "none" else lora.quantize
        if lora is not None:
            # Checkpoints hold the adapters alone; on_load_checkpoint sees to it that they hold all of them.
            self.strict_loading = False
        self.policy: Any = None
        self.reference: Reference | None = None
        self.reestimation = Reestimation(reestimate_every)
        self.train_means = PairMeans()
        self.split_means = nn.ModuleDict({split: PairMeans() for split in VALIDATION_SPLITS})
        self.evaluations: dict[int, dict[str, float]] = {}
        """Validation results by optimiser step; step 0 is the policy before training."""
        self.errors: dict[int, dict[str, float]] = {}
        """Their standard errors, of those that are means over at least two pairs."""
        self._fused: bool | None = None
        self._layout: RowLayout | None = None
        self._grad_norm = torch.zeros(())
        # In a list, so that it is no part of this module before it is its policy.
        self._base: list[nn.Module] = []
        self._window_tokens = 0
        self._window_start = 0.0
        self._validation_start = 0.0

    # Setting up

    def setup(self, stage: str) -> None:
        """Check that model, data and loss fit each other, and score the pairs with the reference."""
        data = self._data()
        config = load_config(self.source)
        check_window(config, data.truncation.max_length, self.source.name)
        check_vocabulary(config, data.tokenizer, self.source.name)
        if self.reference is None:
            if self.reference_source != self.source:
                check_vocabulary(load_config(self.reference_source), data.tokenizer, self.reference_source.name)
            name = self.dtype_name if self.reference_dtype == "auto" else self.reference_dtype
            dtype = resolve_dtype(name, str(self.trainer.precision))
            adapted: Any = self if self.lora is not None and self.reference_source == self.source else None
            if adapted is not None and dtype != self.dtype_used:
                raise InputError(
                    f"model.reference_dtype is {self.reference_dtype}, but with LoRA the reference is the policy "
                    "without its adapters, in the policy's own dtype; leave it out"
                )
            self.reference = Reference(
                self.reference_source, self.reference_mode, dtype, self.scoring, self.prefix_sharing, adapted
            )
            if self.reference_mode == "none" and not (self.loss.needs_reference or self.loss.needs_comprehension):
                rank_zero_info(
                    f"{type(self.loss).__name__} reads no reference, so no pair is scored before training: drift and "
                    "comprehension are not logged; to have them, set model.reference_mode to precomputed"
                )
        self.reference.check_strategy(self.trainer)
        self.reference.check_fits(self.loss)
        self.reestimation.check_fits(self.trainer, self.loss, self.scoring)
        self.reference.prepare(self.trainer, data, self.loss)

    def configure_model(self) -> None:
        """Load the policy, once; by now the scoring pass has let go of the reference."""
        if self.policy is not None:
            return
        self.policy = build_policy(
            self.trainer,
            self.source,
            self.dtype_used,
            self.base_model,
            lora=self.lora,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        self._base.clear()
        if self.compile_backend is not None:
            compile_layers(self.policy, self.compile_backend)

    def base_model(self) -> nn.Module:
        """The whole model before training, loaded once for reference and policy."""
        if not self._base:
            quantization = quantization_config(self.lora)
            self._base.append(load_model(self.source, self.dtype_used, quantization, self.trainer.strategy.root_device))
        return self._base[0]

    @property
    def row_layout(self) -> RowLayout:
        """How the policy reads pairs: tried out when first asked for, with the policy on its device."""
        if self._layout is None:
            data, reference = self._data(), self.reference
            assert reference is not None
            if reference.layout is not None and reference.source == self.source and reference.dtype == self.dtype_used:
                # The same model has been tried, for the scoring.
                assert reference.attention is not None
                set_attention(self.policy, reference.attention)
                self._layout = reference.layout
                return self._layout
            self._layout = choose_layout(
                self.policy,
                data.tables["train"],
                self.prefix_sharing,
                name=self.source.name,
                attention=self.source.attn_implementation,
                pad_id=data.pad_id,
                context=self.trainer.precision_plugin.forward_context,
            )
        return self._layout

    @property
    def dtype_used(self) -> torch.dtype:
        """The dtype that the policy's weights are held in."""
        return resolve_dtype(self.dtype_name, str(self.trainer.precision))

    def configure_optimizers(self) -> Any:
        """The optimiser on its parameter groups, and the schedule over all of the run's steps."""
        optimizer = self.optimizer(parameter_groups(self.policy))
        rate = max(group["lr"] for group in optimizer.param_groups)
        dtype = optimizer.param_groups[0]["params"][0].dtype
        if rate < _SMALLEST_HALF_RATE and dtype in (torch.bfloat16, torch.float16):
            rank_zero_warn(
                f"a learning rate of {rate:g} changes {dtype} weights by less than their rounding, so most "
                "updates are lost; hold the weights in float32 with --trainer.precision bf16-mixed"
            )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = lr_lambda(self.lr_schedule, round(self.warmup_ratio * steps), steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Steps

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """(2, B) float32 log-probabilities of the chosen and of the rejected responses under the policy."""
        return response_logps(self.policy, batch.sequences).view(2, -1)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Measure comprehension on the policy, where it is due."""
        if self.reestimation.due(self.global_step):
            self.reestimation.update(self.policy, self.trainer, self._data(), self.loss, self.scoring, self.row_layout)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Weighted sum of the pairs' losses, which over an optimiser step is their mean."""
        if self._fused is None:
            self._fused = self._choose_head()
        scores = self._scores(batch, "train")
        logps, losses, loss = (self._fused_losses if self._fused else self._losses)(batch, scores)
        self._require_finite(loss, batch, batch_idx)
        self.train_means.update(pair_metrics(self.loss, logps, scores, losses), batch.pair_weight > 0)
        self._window_tokens += batch.num_tokens
        if self.global_step == 0 and batch_idx == 0:
            self._check_start(losses)
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the metrics of held-out pairs, and of the probe of training pairs."""
        split = VALIDATION_SPLITS[dataloader_idx]
        scores = self._scores(batch, split)
        logps, losses, _ = self._losses(batch, scores)
        self._means(split).update(pair_metrics(self.loss, logps, scores, losses), batch.pair_weight > 0)

    def _means(self, split: str) -> PairMeans:
        means = self.split_means[split]
        assert isinstance(means, PairMeans)
        return means

    def _losses(self, batch: PreferenceBatch, scores: PairScores) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's log-probabilities (2, B), the pairs' losses (B,), and the weighted sum of these."""
        logps = self(batch)
        losses = self.loss(logps[0], logps[1], scores)
        return logps, losses, (losses * batch.pair_weight).sum()

    def _fused_losses(self, batch: PreferenceBatch, scores: PairScores) -> tuple[Tensor, Tensor, Tensor]:
        """The same, where only the sum carries gradients: they are computed with it, a few pairs at a time."""

        def loss_of_pairs(chosen: Tensor, rejected: Tensor, index: Tensor) -> Tensor:
            return self.loss(chosen, rejected, scores[index]) * batch.pair_weight[index]

        loss, logps = fused_preference_loss(self.policy, batch.sequences, loss_of_pairs)
        with torch.no_grad():
            return logps, self.loss(logps[0], logps[1], scores), loss

    def _choose_head(self) -> bool:
        """Whether to fuse LM head and loss."""
        if self.lm_head == "logits":
            return False
        data = self._data()
        probe = lay_out(probe_documents(data.tables["train"]), self.row_layout, data.pad_id)
        objection = why_not_fused(self.policy, probe.to(self.device))
        if objection is None:
            return True
        if self.lm_head == "fused":
            raise InputError(f"model.lm_head is fused, but {self.source.name} cannot be: {objection}; set it to auto")
        rank_zero_info(f"LM head and loss are not fused: {objection}")
        return False

    def _scores(self, batch: PreferenceBatch, split: str) -> PairScores:
        """What is known of the pairs at `batch` of `split`."""
        assert self.reference is not None
        scores = self.reference.scores(split, batch.pair_index, self._data(), self.loss)
        latest = self.reestimation.values(split, batch.pair_index)
        comprehension = scores.comprehension if latest is None else latest
        return PairScores(
            *batch.lengths,
            *(scores.reference if scores.reference is not None else (None, None)),
            *(comprehension if comprehension is not None else (None, None)),
            *(batch.safe if batch.safe is not None else (None, None)),
        )

    # Guards

    def _require_finite(self, loss: Tensor, batch: PreferenceBatch, batch_idx: int) -> None:
        """Raise on every rank if `loss` is not finite on any: before the backward pass, with the weights still good."""
        finite = bool(torch.isfinite(loss.detach()))
        if self.trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        places = [self._data().tables["train"].places[i] for i in batch.pair_index.tolist()]
        culprit = "" if finite else f" Its pairs: {'; '.join(places[:8])}{'; …' if len(places) > 8 else ''}."
        raise NonFiniteError(
            f"the loss is {loss.item()} in epoch {self.current_epoch}, batch {batch_idx} (after {self.global_step} "
            f"optimiser steps).{culprit} The weights are those of the last good step. "
            "Lower the learning rate, or use bf16 instead of fp16"
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm, and stop before a step with a gradient that is not finite."""
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.log("train/grad_norm", norm)
        self._grad_norm = norm
        # With fp16's loss scaling an overflow is ordinary: the scaler skips the step and lowers the scale.
        if not str(self.trainer.precision).startswith("16") and not torch.isfinite(norm):
            raise NonFiniteError(
                f"the gradient's norm is {norm.item()} at optimiser step {self.global_step} in epoch "
                f"{self.current_epoch}, with a finite loss. The weights are those of the last good step. "
                "Lower the learning rate"
            )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that `on_before_optimizer_step` has measured.

        Lightning would measure it again, and refuses to clip for a fused optimiser under bf16-mixed, which is harmless:
        only fp16's scaler is in the way of that.
        """
        by_norm = gradient_clip_algorithm in (None, "norm")
        if not by_norm or not gradient_clip_val or str(self.trainer.precision).startswith("16"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self._grad_norm.device.type != "cpu" or self._grad_norm > gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.policy.parameters(), gradient_clip_val, self._grad_norm)

    def _check_start(self, losses: Tensor) -> None:
        """Warn if the first loss is not what it must be when the policy is its own reference (ln 2 for DPO)."""
        expected = self.loss.initial_value
        if expected is None or self.reference_mode == "none" or self.reference_source != self.source:
            return
        low = str(self.trainer.precision).startswith(("bf16", "16"))
        error = (losses.detach() - expected).abs().max().item()
        if error > (2e-2 if low else 1e-4) * max(1.0, expected):
            rank_zero_warn(
                f"the first loss is off by {error:.2g} from {expected:.4f}, its value for a policy that equals its "
                "reference: policy and reference are computed differently (dtype, attention, or a stale cache?)"
            )
        else:
            rank_zero_info(f"First loss {losses.detach().mean().item():.6f}: policy and reference agree")

    # Logging

    def on_train_start(self) -> None:
        """Start the clock of the throughput."""
        self._window_start, self._window_tokens = time.perf_counter(), 0

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        """Every `log_every_n_steps` optimiser steps, log the means over all pairs since the last time."""
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if not stepped or self.global_step % max(1, self.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return
        means = self.train_means.compute()
        self.train_means.reset()
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=name in ("loss", "margin", "accuracy"))
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        self.log("train/tokens_per_second", self._tokens_per_second(), prog_bar=True)

    def _tokens_per_second(self) -> Tensor:
        now = time.perf_counter()
        rate = torch.tensor(self._window_tokens / (now - self._window_start), device=self.device, dtype=torch.float32)
        self._window_start, self._window_tokens = now, 0
        return self.trainer.strategy.reduce(rate, reduce_op="sum")

    def on_validation_start(self) -> None:
        """Stop the clock: validation is no part of the throughput."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self) -> None:
        """Let the clock go on."""
        self._window_start += time.perf_counter() - self._validation_start

    def on_validation_epoch_end(self) -> None:
        """Log the means of each split, and the gap between them: overfitting as a curve."""
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        for split in VALIDATION_SPLITS:
            means = self._means(split)
            values |= {f"{split}/{name}": value for name, value in means.compute().items()}
            errors |= {f"{split}/{name}": value for name, value in means.errors.items()}
            means.reset()
        for name in ("margin", "accuracy"):
            if f"train_probe/{name}" in values and f"held_out/{name}" in values:
                values[f"gap/{name}"] = values[f"train_probe/{name}"] - values[f"held_out/{name}"]
                of_both = [errors.get(f"{split}/{name}", math.nan) for split in ("train_probe", "held_out")]
                errors |= {f"gap/{name}": math.hypot(*of_both)} if not any(map(math.isnan, of_both)) else {}
        self.evaluations[self.global_step] = values
        self.errors[self.global_step] = errors
        # The means are the same on every rank already; sync_dist only says so to Lightning.
        self.log_dict(values, sync_dist=True)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which model the weights belong to, and keep what was measured on the way."""
        checkpoint["bdpo_pl"] = {
            "policy": self.source.name,
            "revision": self.source.revision,
            "reestimation": self.reestimation.state_dict(),
            "lora": None if self.lora is None else dataclasses.asdict(self.lora),
            # Over all ranks: what the next log line will be the mean of.
            "train_means": self.train_means.joined(self.trainer.strategy.reduce),
            # What the closing table of a resumed run begins with.
            "before": self.evaluations.get(0, {}),
        }
        trained = self._trained_names()
        # Where the weights are split, only rank 0 has them.
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model.

        Raises:
            InputError: the checkpoint was written for another policy.
        """
        saved = checkpoint.get("bdpo_pl", {})
        if saved.get("policy", self.source.name) != self.source.name:
            raise InputError(
                f"the checkpoint holds weights of {saved['policy']}, but model.policy is {self.source.name}"
            )
        adapters = None if self.lora is None else dataclasses.asdict(self.lora)
        if saved.get("lora") != adapters or not self._trained_names() <= checkpoint["state_dict"].keys():
            raise InputError(
                f"the checkpoint was written with model.lora {saved.get('lora')}, but it is now {adapters}; "
                "resume with the options it was written with"
            )
        if "reestimation" in saved:
            self.reestimation.load_state_dict(saved["reestimation"])
        if saved.get("before"):
            self.evaluations.setdefault(0, saved["before"])
        if "train_means" in saved and self.trainer.is_global_zero:
            self.train_means.take_up(saved["train_means"])

    def _trained_names(self) -> set[str]:
        """Names in a checkpoint's state: everything, or with LoRA the adapters."""
        if self.lora is None:
            return set(self.state_dict())
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _data(self) -> PreferenceDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PreferenceDataModule):
            raise InputError("PreferenceModule trains on a PreferenceDataModule: trainer.fit(module, datamodule)")
        return data


def _resolve(name: str) -> str:
    return str(embedded.MODEL_DIR) if name == EMBEDDED else name
