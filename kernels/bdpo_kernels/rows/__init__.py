"""Operations on rows of logits, one implementation a file: `torch`, `triton` and, over ranks, `sharded`.

All keep the contract of `bdpo_kernels.backends.Rows`.
"""
