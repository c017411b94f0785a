"""Fused log-probability kernels for preference losses: Triton on GPU, chunked PyTorch everywhere else."""
