"""The way in which losses are computed from the policy: its LM head fused or not, alone or with other ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy

from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.errors import InputError
from bdpo_pl.forward.context_parts import check_reading, logps_together, short_documents
from bdpo_pl.forward.fused_loss import LMHead, choose_head
from bdpo_pl.forward.prefix_sharing import probe_documents
from bdpo_pl.losses import PairScores, PreferenceLoss
from bdpo_pl.models.activation_offloading import check_activation_offloading
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import ModelSource, load_config
from bdpo_pl.models.precision import device_of
from bdpo_pl.parallel.context_parallel import ContextGroup, check_context_parallel
from bdpo_pl.parallel.ranks import context_group
from bdpo_pl.scoring.reference import ReferenceMode
from bdpo_pl.training.steps import Losses, fused_losses, plain_losses


class Options(Protocol):
    """Options of a module that matter if ranks share rows, or if activations are moved.

    Attributes:
        source: policy.
        activation_offloading: move activations to the host's memory until the backward pass.
        compile_backend: backend for `torch.compile`; None: not compiled.
        quantization: name of the quantisation of the frozen weights, if any.
        router_aux_loss: coefficient of the loss that balances experts.
        reference_mode: use of the reference.
    """

    source: ModelSource
    activation_offloading: bool
    compile_backend: str | None
    router_aux_loss: float
    reference_mode: ReferenceMode

    @property
    def quantization(self) -> str | None: ...  # noqa: D102


class PolicyReader:
    """Computes losses from the policy in ways that trials have admitted.

    Args:
        lm_head: computation of the LM head: `fused`, `logits` or `auto`.
        name: name of the policy, for messages.
    """

    def __init__(self, lm_head: LMHead, name: str) -> None:
        self.lm_head = lm_head
        self.name = name
        self._context: ContextGroup | None = None
        self._fused: bool | None = None

    def check_sharing(
        self, trainer: L.Trainer, policy: CausalLM, splits: PreferenceSplits, layout: Callable[[], RowLayout]
    ) -> None:
        """Compare rows that ranks read together with rows read alone, if the strategy has ranks share rows.

        Raises:
            InputError: they differ.
        """
        if (context := context_group(trainer)) is None:
            return
        autocast = trainer.precision_plugin.forward_context
        documents = short_documents(splits.tables["train"])
        check_reading(policy, documents, layout(), context, name=self.name, pad_id=splits.pad_id, autocast=autocast)
        self._context = context

    def choose_head(self, policy: CausalLM, loss: PreferenceLoss, splits: PreferenceSplits, layout: RowLayout) -> None:
        """Decide once whether the LM head is fused, by a comparison on real pairs."""
        if self._fused is not None:
            return
        table = splits.tables["train"]
        documents = probe_documents(table, policy) if self._context is None else short_documents(table)
        probe = lay_out(documents, layout, splits.pad_id).to(device_of(policy))
        # Ranks that share rows sum log-probabilities before they compute the loss, so any loss can be computed so.
        objection = None if self._context is not None else loss.not_fused
        self._fused = choose_head(policy, probe, self.lm_head, self.name, objection=objection)

    def losses(
        self, policy: CausalLM, loss: PreferenceLoss, batch: PreferenceBatch, scores: PairScores, *, trained: bool
    ) -> Losses:
        """Compute log-probabilities and losses of a batch, with gradients if the batch is `trained` on."""
        fused = trained and bool(self._fused)
        if self._context is not None:
            read = partial(logps_together, context=self._context, fused=fused)
            return plain_losses(policy, loss, batch, scores, read)
        return (fused_losses if fused else plain_losses)(policy, loss, batch, scores)


def check_options(module: Options, trainer: L.Trainer) -> None:
    """Raise `InputError` if an option of `module` has no effect here, or is not made for how ranks share work."""
    if module.activation_offloading:
        kind = trainer.strategy.root_device.type
        check_activation_offloading(kind, module.compile_backend is not None)
    if module.quantization is not None and isinstance(trainer.strategy, ModelParallelStrategy):
        raise InputError(
            f"model.lora.quantize is {module.quantization}, and quantised weights are not split by "
            f"{type(trainer.strategy).__name__}; set it to none, or trainer.strategy to ddp"
        )
    if (context := context_group(trainer)) is None:
        return
    check_context_parallel(load_config(module.source), context.size, module.source.name)
    for given, option, remedy in (
        (module.compile_backend is not None, "model.compile", "leave it out"),
        (module.router_aux_loss > 0, "model.router_aux_loss", "set it to 0"),
        (module.reference_mode == "live", "model.reference_mode live", "set it to precomputed"),
    ):
        if given:
            raise InputError(
                f"{option} does not work with trainer.strategy.context_parallel_size {context.size}, whose ranks share "
                f"the rows of a batch; {remedy}, or set context_parallel_size to 1"
            )
