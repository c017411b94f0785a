"""Fused log-probability kernels for preference losses: Triton on GPU, chunked PyTorch everywhere else.

- `sequence_logprob`: from logits to log-probabilities.
- `linear_sequence_logprob`: from the hidden states before the LM head to log-probabilities.
- `linear_preference_loss`: from the hidden states to a loss on pairs; its gradients are computed in the forward pass.

The last two take a `VocabShard` if the LM head is split over ranks. `backends` selects `rows.triton` or `rows.torch`
for all of them; both implement the same contract.
"""

from importlib import metadata

from bdpo_kernels.linear_preference_loss import linear_preference_loss
from bdpo_kernels.linear_sequence_logprob import linear_sequence_logprob
from bdpo_kernels.rows.sharded import VocabShard
from bdpo_kernels.sequence_logprob import sequence_logprob

__version__ = metadata.version("bdpo-pl")
__all__ = [
    "VocabShard",
    "__version__",
    "linear_preference_loss",
    "linear_sequence_logprob",
    "sequence_logprob",
]
