"""Fused log-probability kernels for preference losses: Triton on GPU, chunked PyTorch everywhere else.

`sequence_logprob` is the public function; `backends` picks `triton_rows` or `torch_rows`, twins under one contract.
"""

from bdpo_kernels.sequence_logprob import sequence_logprob

__version__ = "0.1.0"
__all__ = ["__version__", "sequence_logprob"]
