"""Greedy decoding in continuous batches: a sequence that ends is replaced by one that waits.

Prompts are taken longest first. What all of them begin with, such as a system prompt, is computed once. Each forward
pass computes sequences that are not finished, and no padding but that of prompts which begin together. When nobody
waits, the sequences that are left close ranks.

In another batch, products are rounded differently. Where the two best tokens are closer than rounding explains, the
sequence is handed back (`Decoded.tokens` is None), for the caller to decode alone: so its answer depends on no
neighbour. In half precision this would be most sequences, so nothing is handed back.

Shapes: N rows; T tokens of a row; P places of a slot; V size of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from bdpo_pl.forward.equivalence import compute_dtype, is_precise, rounding_of_logits
from bdpo_pl.forward.masks import layer_kinds
from bdpo_pl.forward.slots import SlotCache
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of

# Share of the slots that are filled together: a pass over a single prompt makes poor use of the weights it reads.
_FILLED_TOGETHER = 8


@dataclass(frozen=True)
class Decoded:
    """The continuation of a prompt.

    Attributes:
        number: number of the prompt.
        tokens: generated tokens, without the stop token; None if rounding could have decided one of them.
        finished: true if a stop token was generated.
    """

    number: int
    tokens: list[int] | None
    finished: bool = False


@dataclass
class _Sequence:
    number: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    outcome: Decoded | None = None

    @property
    def length(self) -> int:
        """Number of places that are filled."""
        return len(self.prompt) + len(self.tokens) - 1


class Decoder:
    """Greedy decoding of a model in continuous batches. Call it within `torch.no_grad`, in evaluation mode.

    Attributes:
        passes: number of forward passes until now.
        rows: number of rows in them, each a sequence that was not finished.

    Args:
        model: model for which `why_not_continuous` finds no reason.
        stops: tokens that end a sequence.
        max_new_tokens: maximum number of generated tokens.
        num_slots: maximum number of sequences at a time.
        hands_back: hand back sequences whose next token rounding could decide, unless the dtype is half precision.
        watch: function that is called with the prompt's number and the logits whenever a token is chosen.
    """

    def __init__(
        self,
        model: CausalLM,
        stops: Collection[int],
        *,
        max_new_tokens: int,
        num_slots: int,
        hands_back: bool = True,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self._model, self._stops = model, frozenset(stops)
        self._max_new_tokens, self._num_slots, self._watch = max_new_tokens, num_slots, watch
        self._device, self._dtype = device_of(model), compute_dtype(model)
        self._hands_back = hands_back and is_precise(self._dtype)
        self._additive = model.config._attn_implementation == "eager"
        self._penalty = getattr(model.generation_config, "repetition_penalty", None) or 1.0
        self._arguments = call_arguments(model)
        self._kinds = layer_kinds(model.config.get_text_config())
        self.passes = self.rows = 0

    def decode(self, prompts: Sequence[list[int]]) -> Iterator[Decoded]:
        """Continue each of `prompts`, and yield the continuations as they end."""
        waiting = deque(longest_first(prompts))
        places = max(map(len, prompts), default=0) + self._max_new_tokens
        cache = SlotCache(min(self._num_slots, len(prompts)), places)
        shared = _shared_prefix(prompts)
        if shared:
            self._forward(cache, 0, [prompts[0][:shared]], 0)
            cache.spread(shared)
        active: list[_Sequence] = []
        while waiting or active:
            free = cache.num_slots - len(active)
            if waiting and (not active or free >= max(1, cache.num_slots // _FILLED_TOGETHER)):
                new = [_Sequence(i, prompts[i]) for i in (waiting.popleft() for _ in range(min(free, len(waiting))))]
                logits = self._forward(cache, len(active), [s.prompt[shared:] for s in new], shared)
                active += new
            else:
                new = active
                logits = self._forward(cache, 0, [s.tokens[-1:] for s in active], [s.length for s in active])
            self._choose(new, logits)
            yield from (s.outcome for s in new if s.outcome is not None)
            active = _close_ranks(cache, active)

    def _forward(self, cache: SlotCache, first: int, rows: Sequence[list[int]], starts: int | Sequence[int]) -> Tensor:
        """Read `rows` into neighbouring slots, and return the (N, V) float32 logits after the last token of each.

        Args:
            cache: keys and values of the earlier tokens.
            first: slot of the first row.
            rows: tokens of each row.
            starts: number of earlier tokens of each row, or of all.
        """
        N, T = len(rows), max(map(len, rows))
        starts = [starts] * N if isinstance(starts, int) else starts
        # Padded on the left, so that the last token of every row is the last one.
        pads = torch.tensor([T - len(row) for row in rows]).unsqueeze(1)
        ids = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=self._device)
        positions = torch.arange(T) - pads + torch.tensor(starts).unsqueeze(1)
        padding = torch.arange(T) < pads
        width = int(positions.max()) + 1
        cache.aim(first, positions.masked_fill(padding, cache.num_places).to(self._device), width)
        positions = positions.masked_fill(padding, 0).to(self._device)
        mask = (torch.arange(width, device=self._device) <= positions.unsqueeze(-1)).unsqueeze(1)
        if self._additive:
            mask = torch.zeros(mask.shape, dtype=self._model.dtype, device=self._device).masked_fill_(
                ~mask, torch.finfo(self._model.dtype).min
            )
        self.passes, self.rows = self.passes + 1, self.rows + N
        outputs = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=dict.fromkeys(self._kinds, mask) if len(self._kinds) > 1 else mask,
            use_cache=True,
            **{self._arguments.cache: cache},
            **self._arguments.last_only,
        )
        return outputs.logits[:, -1].float()

    def _choose(self, sequences: Sequence[_Sequence], logits: Tensor) -> None:
        """Add the best token to each of `sequences`, or its outcome."""
        if self._penalty != 1.0:
            logits = torch.stack([self._penalised(s, row) for s, row in zip(sequences, logits, strict=True)])
        if self._watch is not None:
            for s, row in zip(sequences, logits, strict=True):
                self._watch(s.number, row)
        best, tokens = logits.max(-1)
        tied = [False] * len(sequences)
        if self._hands_back:
            second = logits.scatter(1, tokens.unsqueeze(1), -torch.inf).max(-1).values
            tied = (best - second <= rounding_of_logits(best, self._dtype)).tolist()
        for s, token, is_tied in zip(sequences, tokens.tolist(), tied, strict=True):
            if is_tied:
                s.outcome = Decoded(s.number, None)
            elif token in self._stops:
                s.outcome = Decoded(s.number, s.tokens, finished=True)
            else:
                s.tokens.append(token)
                if len(s.tokens) == self._max_new_tokens:
                    s.outcome = Decoded(s.number, s.tokens)

    def _penalised(self, sequence: _Sequence, logits: Tensor) -> Tensor:
        """Return the (V,) logits after the model's own penalty of tokens that it has read or written."""
        seen = torch.tensor(sorted({*sequence.prompt, *sequence.tokens}), device=logits.device)
        found = logits[seen]
        return logits.index_copy(0, seen, torch.where(found < 0, found * self._penalty, found / self._penalty))


def longest_first(prompts: Sequence[list[int]]) -> list[int]:
    """Return the numbers of `prompts`, the longest first, so that running out of memory shows at once."""
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Return the number of tokens that all `prompts` begin with; the last token of a prompt does not count."""
    if len(prompts) < 2:
        return 0
    # All lie between these two in the order of lists, so they begin with what the two have in common.
    ends = zip(min(prompts), max(prompts), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    return min(common, min(map(len, prompts)) - 1)


def _close_ranks(cache: SlotCache, active: list[_Sequence]) -> list[_Sequence]:
    """Return the sequences that go on, after the last of them have moved into the slots that became free."""
    left = list(active)
    for slot in range(len(left) - 1, -1, -1):
        if left[slot].outcome is not None:
            last = left.pop()
            if slot < len(left):
                cache.move(len(left), slot, last.length)
                left[slot] = last
    return left


@dataclass(frozen=True)
class CallArguments:
    """Names of a model's arguments, which differ between architectures and releases of transformers.

    Attributes:
        cache: name of the argument for the cache; empty if the model takes none.
        last_only: argument for which the LM head is computed for the last token alone.
    """

    cache: str
    last_only: dict[str, Any]


def call_arguments(model: CausalLM) -> CallArguments:
    """Return the names of `model`'s arguments."""
    known = inspect.signature(model.forward).parameters
    cache = next((name for name in ("cache", "past_key_values") if name in known), "")
    return CallArguments(cache, {"logits_to_keep": 1} if "logits_to_keep" in known else {})
