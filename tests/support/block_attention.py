"""FlexAttention as it is on a CPU."""

import torch
from torch.nn.attention.flex_attention import create_mask


def attend_by_blocks(module, query, key, value, blocks, scaling=None, **kwargs):
    """What compiled attention computes, uncompiled: that has no backward pass on a CPU."""
    T = query.shape[2]
    mask = create_mask(blocks.mask_mod, query.shape[0], None, T, T, "cpu")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None
