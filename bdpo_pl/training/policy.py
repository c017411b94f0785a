"""Construction of the policy for training: whole or split, with or without adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from bdpo_pl.models.activation_offloading import OffloadedActivations
from bdpo_pl.models.adapters import LoraOptions, add_adapters
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import ModelSource, compile_layers, enable_activation_checkpointing
from bdpo_pl.models.precision import half_products
from bdpo_pl.models.reach import freeze_unreached


class PolicyOptions(Protocol):
    """Options of a module that say how its policy is built.

    Attributes:
        source: model to train.
        lora: options of the adapters to add, unless the loaded model has them; then nothing else is trained.
        gradient_checkpointing: recompute activations in the backward pass.
        activation_offloading: move activations to the host's memory until the backward pass.
        compile_backend: backend for `torch.compile` of the layers; None: not compiled.
    """

    source: ModelSource
    lora: LoraOptions | None
    gradient_checkpointing: bool
    activation_offloading: bool
    compile_backend: str | None

    @property
    def dtype_used(self) -> torch.dtype: ...  # noqa: D102


def build_policy(trainer: L.Trainer, options: PolicyOptions, load: Callable[[], CausalLM]) -> CausalLM:
    """Build the policy in training mode, split if the Trainer's strategy splits models.

    Args:
        trainer: Trainer with its strategy.
        options: options of the policy.
        load: function that loads the whole model; it is not called for a model that is split.

    Raises:
        InputError: the model, the adapters and the strategy do not fit together.
    """
    source, dtype, lora = options.source, options.dtype_used, options.lora
    strategy = trainer.strategy
    model: CausalLM
    if isinstance(strategy, ModelParallelStrategy):
        from bdpo_pl.parallel.fsdp2 import build_sharded

        model = build_sharded(
            source,
            dtype,
            strategy.device_mesh,
            strategy.root_device,
            lora=lora,
            gradient_checkpointing=options.gradient_checkpointing,
            half_products=half_products(str(trainer.precision)),
            cpu_offload=getattr(strategy, "cpu_offload", False),
        )
    else:
        model = load()
        freeze_unreached(model)
        if options.gradient_checkpointing:
            enable_activation_checkpointing(model)
        if lora is not None:
            add_adapters(model, lora)
    if options.compile_backend is not None:
        compile_layers(model, options.compile_backend)
    if options.activation_offloading:
        OffloadedActivations(model, strategy.root_device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = "" if lora is None else f", {trained:,} of them trained"
    rank_zero_info(
        f"Policy: {type(model).__name__.removeprefix('FSDP')}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters in {str(dtype).removeprefix('torch.')}{share}, from {source.name}"
    )
    # transformers loads models in evaluation mode, and Lightning does not change the mode.
    return model.train()
