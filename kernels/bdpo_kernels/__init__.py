"""Fused log-probability kernels for preference losses: Triton on GPU, chunked PyTorch everywhere else.

Shapes: N packed tokens, S sequences, V vocabulary; B rows and T positions where input is padded.
"""

from bdpo_kernels.sequence import sequence_logprob

__version__ = "0.1.0"

__all__ = ["__version__", "sequence_logprob"]
