"""Fused log-probability kernels for preference losses: Triton on GPU, chunked PyTorch everywhere else.

- `sequence_logprob`: from logits.
- `linear_sequence_logprob`: from the hidden states before the LM head.
- `linear_preference_loss`: the same, through a loss on pairs, with its gradients computed on the way forward.

The last two take a `VocabShard` where the LM head is split over ranks. `backends` picks `rows.triton` or `rows.torch`
for all of them, twins under one contract.
"""

from bdpo_kernels.linear_preference_loss import linear_preference_loss
from bdpo_kernels.linear_sequence_logprob import linear_sequence_logprob
from bdpo_kernels.rows.sharded import VocabShard
from bdpo_kernels.sequence_logprob import sequence_logprob

__version__ = "0.1.0"
__all__ = [
    "VocabShard",
    "__version__",
    "linear_preference_loss",
    "linear_sequence_logprob",
    "sequence_logprob",
]
