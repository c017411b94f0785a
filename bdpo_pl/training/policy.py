"""The policy as it is trained: whole or split, with adapters or without; and its way back to a plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from bdpo_pl.models.adapters import LoraOptions, add_adapters
from bdpo_pl.models.loading import ModelSource, enable_activation_checkpointing
from bdpo_pl.models.precision import half_products
from bdpo_pl.models.reach import freeze_unreached


def build_policy(
    trainer: L.Trainer,
    source: ModelSource,
    dtype: torch.dtype,
    load: Callable[[], nn.Module],
    *,
    lora: LoraOptions | None = None,
    gradient_checkpointing: bool = False,
) -> Any:
    """The policy in training mode, as the Trainer's strategy wants it.

    Args:
        trainer: its strategy says whether and how the model is split.
        source: the model.
        dtype: of its weights.
        load: gives the whole model; not called where it is split.
        lora: adapters to add, if the model that `load` gives has none yet; then nothing else is trained.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        InputError: the model, the adapters and the strategy do not fit each other.
    """
    strategy = trainer.strategy
    model: Any
    if isinstance(strategy, ModelParallelStrategy):
        from bdpo_pl.parallel.fsdp2 import build_sharded

        model = build_sharded(
            source,
            dtype,
            strategy.device_mesh,
            strategy.root_device,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            half_products=half_products(str(trainer.precision)),
        )
    else:
        model = load()
        freeze_unreached(model)
        if gradient_checkpointing:
            enable_activation_checkpointing(model)
        if lora is not None:
            add_adapters(model, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = "" if lora is None else f", {trained:,} of them trained"
    rank_zero_info(
        f"Policy: {type(model).__name__.removeprefix('FSDP')}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters in {str(dtype).removeprefix('torch.')}{share}, from {source.name}"
    )
    # transformers loads in evaluation mode, and Lightning keeps the mode it finds.
    return model.train()
