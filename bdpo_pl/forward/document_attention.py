"""Attention of one document at a time, for a row of documents without padding.

On a CPU, time follows the number of positions, and a call of an operation costs little. Rows of equal length pad short
documents, and a dense mask over several documents computes places that no token sees. Here all documents are in one
row, which every other operation reads as it is, and attention is computed for each of them with a mask of its own.

Shapes: T positions; H heads; K heads of keys and values; d size of a head; L tokens of a document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOCUMENTS = "bdpo_documents"
"""Name of this attention among transformers' implementations."""

_PLAIN = "sdpa"
# Arguments of attention functions that no mask of a document expresses.
_REFUSED = ("softcap", "position_bias", "s_aux")


class DocumentMasks(Tensor):
    """The masks of the documents of one row, as an empty tensor: models pass a four-dimensional mask on unchanged.

    Attributes:
        documents: (start, end, mask) of each document, in the order of the row; the masks are (1, 1, L, L) bool, true
            where the query sees the key.
    """

    documents: list[tuple[int, int, Tensor]]
    # A view of it or a copy is a plain tensor, which is not taken for the masks.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, documents: list[tuple[int, int, Tensor]]) -> DocumentMasks:
        """Return the masks of `documents`, which fill the row without a gap."""
        masks = torch.empty(1, 1, 0, 0, dtype=torch.bool).as_subclass(cls)
        masks.documents = documents
        return masks


def register() -> None:
    """Make this attention known to transformers, by the name `DOCUMENTS`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if DOCUMENTS not in AttentionInterface():
        AttentionInterface.register(DOCUMENTS, attend)
        AttentionMaskInterface.register(DOCUMENTS, AttentionMaskInterface()[_PLAIN])


@torch.compiler.disable  # compiled layers leave it out: their graphs take no list of masks
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: object,
) -> tuple[Tensor, None]:
    """Return (1, T, H, d) for queries (1, H, T, d), keys and values (1, K, T, d), as transformers' functions do.

    Any mask but `DocumentMasks` is left to PyTorch's own attention.

    Raises:
        ValueError: the layer has biases or caps that no mask expresses.
    """
    if not isinstance(attention_mask, DocumentMasks):
        from transformers import AttentionInterface

        plain: tuple[Tensor, None] = AttentionInterface()[_PLAIN](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
        return plain
    if given := [name for name in _REFUSED if options.get(name) is not None]:
        raise ValueError(f"attention of one document at a time takes no {', '.join(given)}")
    found = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end, mask in attention_mask.documents
    ]
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None
