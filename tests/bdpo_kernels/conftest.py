"""With no GPU, Triton's kernels run in its interpreter; the variable is read when they are first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
