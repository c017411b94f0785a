"""Loss of a target at the beginning of a model's answer, as a function of the prompt's suffix, and its gradient.

Shapes: C candidates; n tokens in a suffix, m in the target; V vocabulary; D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdpo_pl.errors import InputError
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import num_positions

_VOCABULARY_CHUNK = 16384


class TargetLoss:
    """Mean cross-entropy of `target` after [before | suffix | after], in nats per token.

    Args:
        model: a transformers causal language model in evaluation mode.
        before: ids before the suffix.
        after: ids after the suffix.
        target: m ids with which the answer should begin.
        batch_size: number of candidates in a forward pass.
    """

    def __init__(
        self, model: CausalLM, before: Sequence[int], after: Sequence[int], target: Sequence[int], batch_size: int
    ) -> None:
        self._model = model
        self._embedding = model.get_input_embeddings()
        device = self._embedding.weight.device
        self._before, self._after, self._target = (
            torch.tensor(list(ids), dtype=torch.int64, device=device) for ids in (before, after, target)
        )
        self._batch_size = batch_size
        # The logits of the other positions are not needed.
        self._options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = len(target) + 1

    def check_length(self, suffix_length: int) -> None:
        """Raise `InputError` if prompt and target do not fit into the model's positions."""
        window = num_positions(self._model.config)
        length = len(self._before) + suffix_length + len(self._after) + len(self._target)
        if window is not None and length > window:
            raise InputError(
                f"a prompt with its suffix and target has {length} tokens, but the model has positions for {window}; "
                "leave the prompt out, or shorten gcg.suffix"
            )

    @torch.no_grad()
    def of(self, suffixes: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of each suffix, and whether greedy decoding gives the target.

        Args:
            suffixes: (C, n) ids.

        Returns:
            (C,) loss and (C,) bool, both on the CPU.
        """
        losses, matches = [], []
        for batch in suffixes.split(self._batch_size):
            logits = self._logits(batch.to(self._target.device))
            losses.append(self._cross_entropy(logits).cpu())
            # Greedy decoding gives the target if each of its tokens is the most likely one after those before it.
            matches.append((logits.argmax(-1) == self._target).all(-1).cpu())
        return torch.cat(losses), torch.cat(matches)

    def gradient(self, suffix: Tensor) -> Tensor:
        """Compute ∂ loss / ∂ one-hot of each token of the suffix.

        The embedding of a one-hot vector is linear in it, so this is the gradient at the embedding layer's output times
        the embedding of every token. A scale that the layer applies is included in both. A tied LM head does not
        contribute.

        Args:
            suffix: (n,) ids.

        Returns:
            (n, V) gradient.
        """
        embedded: list[Tensor] = []

        def take(module: nn.Module, args: object, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        hook = self._embedding.register_forward_hook(take)
        try:
            with torch.enable_grad():
                loss = self._cross_entropy(self._logits(suffix[None].to(self._target.device))).sum()
                if len(embedded) != 1:
                    raise InputError(
                        f"gcg: {type(self._model).__name__} does not embed its tokens just once; attack another model"
                    )
                (whole,) = torch.autograd.grad(loss, embedded)
        finally:
            hook.remove()
        start = len(self._before)
        gradient = whole[0, start : start + len(suffix)]
        with torch.no_grad():
            ids = torch.arange(self._embedding.weight.shape[0], device=gradient.device)
            return torch.cat([gradient @ self._embedding(chunk).T for chunk in ids.split(_VOCABULARY_CHUNK)], dim=1)

    def _logits(self, suffixes: Tensor) -> Tensor:
        """Compute the (C, m, V) logits that predict the target."""
        before, after, target = (ids.expand(len(suffixes), -1) for ids in (self._before, self._after, self._target))
        ids = torch.cat([before, suffixes, after, target], dim=1)
        logits = self._model(input_ids=ids, **self._options).logits
        return logits[:, -len(self._target) - 1 : -1]

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        """Compute the (C,) mean cross-entropy of the target, in float32 or higher precision."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = self._target.expand(len(logits), -1)
        return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)
