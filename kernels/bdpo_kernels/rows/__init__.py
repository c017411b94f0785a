"""Operations on rows of logits, one implementation per file: `torch`, `triton` and, over ranks, `sharded`.

All implement the contract of `bdpo_kernels.backends.Rows`.
"""
