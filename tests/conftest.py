"""The environment of all tests, set before anything that reads it is imported."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    # With no GPU the Triton kernels run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
