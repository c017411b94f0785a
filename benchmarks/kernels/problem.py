"""The input of every contender: one batch of preference pairs at the LM head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem.

    Attributes:
        name: name on the command line.
        N: number of tokens.
        D: hidden size.
        V: vocabulary.
        T: number of tokens in each response; the same for all, so that padded peers pad nothing.
        softcap: soft cap of the logits.
        dtype: dtype of hidden states and weight.
    """

    name: str
    N: int
    D: int
    V: int
    T: int
    softcap: float | None = None
    dtype: torch.dtype = torch.float32


_HALF = torch.bfloat16
SHAPES = {
    "laptop": (Shape("512x256x32000", 512, 256, 32_000, 64),),
    "cpu": (
        Shape("1024x512x32000", 1024, 512, 32_000, 128),
        Shape("2048x512x152064", 2048, 512, 152_064, 128),
        Shape("4096x1024x32000", 4096, 1024, 32_000, 256),
    ),
    # For CPUs whose matrix products take bfloat16 (AMX, AVX512-BF16).
    "cpu-bf16": (
        Shape("1024x512x32000 bf16", 1024, 512, 32_000, 128, dtype=_HALF),
        Shape("4096x1024x32000 bf16", 4096, 1024, 32_000, 256, dtype=_HALF),
    ),
    "tiny": (Shape("tiny", 32, 16, 100, 8),),
    "qwen2-7b": (Shape("Qwen2-7B", 8192, 3584, 152_064, 512, dtype=_HALF),),
    "llama-3-8b": (Shape("Llama-3-8B", 8192, 4096, 128_256, 512, dtype=_HALF),),
    "mistral-7b": (Shape("Mistral-7B", 8192, 4096, 32_768, 512, dtype=_HALF),),
    "gemma-2-9b": (Shape("Gemma-2-9B", 8192, 3584, 256_000, 512, softcap=30.0, dtype=_HALF),),
}

GPU_SHAPES = ("qwen2-7b", "llama-3-8b", "mistral-7b", "gemma-2-9b")
"""Names of the shapes that are measured on a GPU."""


def find_shape(name: str) -> Shape:
    """Return the shape of that name, or the float32 shape described by `tokens x hidden x vocabulary x response`."""
    for shape in (shape for shapes in SHAPES.values() for shape in shapes):
        if shape.name == name:
            return shape
    N, D, V, T = (int(size) for size in name.split("x"))
    return Shape(name, N, D, V, T)


@dataclass
class Problem:
    """The tensors of a problem: 2B sequences of T tokens, all chosen responses before the rejected ones.

    Attributes:
        shape: sizes of the problem.
        hidden: (N, D) hidden states, a leaf.
        weight: (V, D) weight of the LM head, a leaf.
        labels: (N,) token ids.
        sequence_ids: (N,) sequence of each token.
    """

    shape: Shape
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    sequence_ids: Tensor

    @property
    def num_pairs(self) -> int:
        """Number of pairs B."""
        return self.shape.N // (2 * self.shape.T)

    def sums(self, token_logps: Tensor) -> Tensor:
        """Return the (2B,) sums of the (N,) log-probabilities."""
        return token_logps.float().view(2 * self.num_pairs, self.shape.T).sum(dim=1)

    def mean_loss(self, sequence_logps: Tensor) -> Tensor:
        """Return the DPO loss without a reference: the same arithmetic with one subtraction less."""
        chosen, rejected = sequence_logps.view(2, -1)
        return pair_losses(chosen, rejected).mean()


def pair_losses(chosen: Tensor, rejected: Tensor, index: Tensor | None = None) -> Tensor:
    """Return the loss of each pair."""
    return -F.logsigmoid(BETA * (chosen - rejected))


def make_problem(shape: Shape, device: str, seed: int = 0) -> Problem:
    """Create random hidden states and weights of a trained head's size, the same for every contender."""
    generator = torch.Generator().manual_seed(seed)
    # Filled in place, so that no temporary raises the peak that later measurements are compared with.
    hidden = torch.empty(shape.N, shape.D).normal_(generator=generator).to(device, shape.dtype)
    weight = torch.empty(shape.V, shape.D).normal_(0.0, 2.0 / shape.D**0.5, generator=generator)
    labels = torch.randint(shape.V, (shape.N,), generator=generator)
    ids = torch.arange(shape.N // shape.T).repeat_interleave(shape.T)
    return Problem(
        shape,
        hidden.requires_grad_(),
        weight.to(device, shape.dtype).requires_grad_(),
        labels.to(device),
        ids.to(device),
    )
