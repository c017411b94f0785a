"""The way in which losses are computed from the policy: its LM head fused or not, alone or with other ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning as L

from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.data.packing import RowLayout, lay_out, renumbered
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.forward.context_parts import check_reading, logps_together, short_documents
from bdpo_pl.forward.fused_loss import LMHead, choose_head
from bdpo_pl.forward.prefix_sharing import probe_documents
from bdpo_pl.losses import PairScores, PreferenceLoss
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of
from bdpo_pl.parallel.context_parallel import ContextGroup
from bdpo_pl.parallel.ranks import context_group
from bdpo_pl.training.steps import Losses, fused_losses, plain_losses


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
        probe, shorter = (
            lay_out(some, layout, splits.pad_id).to(device_of(policy))
            for some in (documents, renumbered(documents[-1:]))
        )
        # Ranks that share rows sum log-probabilities before they compute the loss, so any loss can be computed so.
        objection = None if self._context is not None else loss.not_fused
        self._fused = choose_head(policy, probe, self.lm_head, self.name, objection=objection, shorter=shorter)

    def losses(
        self, policy: CausalLM, loss: PreferenceLoss, batch: PreferenceBatch, scores: PairScores, *, trained: bool
    ) -> Losses:
        """Compute log-probabilities and losses of a batch, with gradients if the batch is `trained` on."""
        fused = trained and bool(self._fused)
        if self._context is not None:
            read = partial(logps_together, context=self._context, fused=fused)
            return plain_losses(policy, loss, batch, scores, read)
        return (fused_losses if fused else plain_losses)(policy, loss, batch, scores)
