"""Attention of packed rows, one document at a time, for CPUs: no mask of a whole row, and no padding.

A dense mask costs the square of a row's length, although a token sees only its own document. Here, the context and the
first response of a document are one causal sequence, and each further response attends to the context and itself. The
layers read not a mask but a table of spans, which transformers passes on unchanged because it has the axes of a mask.

Shapes: H heads; T positions of one row; S sequences; m tokens of a context; n tokens of a response.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOCUMENTS = "documents"
"""Name of this implementation among those of transformers."""

# Arguments of attention functions that change the result, and that are not supported here.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window")

Span = tuple[int, int]


def register() -> None:
    """Make `DOCUMENTS` known to transformers, with the masks of sdpa for rows that hold one sequence each."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(DOCUMENTS, attend)
    AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)


@torch.compiler.disable(reason="a loop over documents, whose lengths differ from batch to batch")
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within each document of a row; as sdpa does, where the mask is one of sdpa's.

    Args:
        module: attention layer.
        query: (1, H, T, d) queries.
        key: (1, h, T, d) keys, of h ≤ H heads.
        value: (1, h, T, e) values.
        attention_mask: (1, 1, S, 4) int64 spans of a `SequenceBatch`, or a mask of sdpa.
        dropout: probability of dropout; it must be 0 for spans.
        scaling: factor of the scores.
        kwargs: further arguments of transformers.

    Returns:
        (1, T, H, e) outputs, and no weights.

    Raises:
        ValueError: the layer wants something that is not supported, or the spans do not fill the row.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout or any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        raise ValueError(f"attention by document knows no dropout, {', '.join(_UNSUPPORTED)}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    documents = _documents(attention_mask)
    sizes = [size for context, lengths in documents for size in (context + lengths[0], *lengths[1:])]
    if len(query) != 1 or sum(sizes) != query.shape[2]:
        raise ValueError(f"the spans fill {sum(sizes)} places of {tuple(query.shape[:1])} rows of {query.shape[2]}")
    # One split of the whole: the gradients of slices would each be as large as the row.
    parts = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for context, lengths in documents:
        q, k, v = next(parts)
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        shared_k, shared_v = k[:, :, :context], v[:, :, :context]
        for n in lengths[1:]:
            q, k, v = next(parts)
            k, v = torch.cat([shared_k, k], dim=2), torch.cat([shared_v, v], dim=2)
            mask = _behind(context, n, q.dtype)
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _documents(spans: Tensor) -> list[tuple[int, list[int]]]:
    """Return the tokens of each document's context and of its responses, in the order of the row.

    Raises:
        ValueError: there is a gap between two spans.
    """
    responses: dict[Span, list[Span]] = {}
    for start, end, first, last in spans.view(-1, 4).tolist():
        responses.setdefault((start, end), []).append((first, last))
    documents, at = [], 0
    for (start, end), found in sorted(responses.items()):
        lengths = []
        # A response that is scored in two parts (`parts_of`) has its span twice.
        for first, last in [(start, end), *sorted(set(found))]:
            if first != at:
                raise ValueError(f"a span begins at {first}, not at {at}")
            lengths.append(last - first)
            at = last
        documents.append((lengths[0], lengths[1:]))
    return documents


@lru_cache(maxsize=64)
def _behind(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Return the (n, m + n) mask of a response behind its context: 0 where it sees, −∞ elsewhere."""
    # Kept for training too, which takes no tensor of inference mode.
    with torch.inference_mode(False):
        return torch.full((n, m + n), float("-inf"), dtype=dtype).triu_(diagonal=m + 1)
