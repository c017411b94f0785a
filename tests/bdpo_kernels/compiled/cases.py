"""The operations of `bdpo_kernels`, called so that every kernel is launched as in training.

Tensors are on the CPU and have real vocabularies, but few tokens and a narrow hidden state: only PyTorch's products run
on them. The kernels do not run, so nobody looks at their outputs.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdpo_kernels import backends, linear_preference_loss, linear_sequence_logprob, sequence_logprob

FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
INTEGERS = {"i64": torch.int64, "i32": torch.int32}
HIDDEN = 16


@dataclass(frozen=True)
class Case:
    """One call of an operation, forward and backward.

    Attributes:
        operation: "preference", "linear" or "logits".
        dtype: a name in `FLOATS`, of logits or hidden states.
        V: size of the vocabulary.
        label: a name in `INTEGERS`, of the labels.
        softcap: whether the logits are soft-capped (not in "logits").
        layout: of the logits in "logits": "packed", "shifted" (`logits[:, :-1]`), "long" (more than 2³¹ elements) or
            "transposed".
        tokens: N.
    """

    operation: str = "preference"
    dtype: str = "bf16"
    V: int = 152_064
    label: str = "i64"
    softcap: bool = False
    layout: str = "packed"
    tokens: int = 16

    @property
    def name(self) -> str:
        cap = "+softcap" if self.softcap else ""
        return f"{self.operation}/{self.dtype}/{self.label}/V{self.V}/{self.layout}/N{self.tokens}{cap}"

    @property
    def aligned(self) -> bool:
        """Whether accesses of 16 bytes are possible."""
        return self.V % 16 == 0 and self.layout != "transposed"

    def call(self) -> None:
        """Launch what the operation launches, forward and backward."""
        if self.operation == "logits":
            self._from_logits()
            return
        N, dtype = self.tokens, FLOATS[self.dtype]
        hidden = torch.zeros(N, HIDDEN, dtype=dtype, requires_grad=True)
        weight = torch.zeros(self.V, HIDDEN, dtype=dtype, requires_grad=True)
        labels = torch.zeros(N, dtype=INTEGERS[self.label])
        ids = torch.arange(N) * 4 // N
        options = {"softcap": 30.0 if self.softcap else None, "backend": "triton", "check_labels": False}
        if self.operation == "preference":
            loss, _, _ = linear_preference_loss(hidden, weight, labels, ids, _losses, num_pairs=2, **options)
        else:
            loss = linear_sequence_logprob(hidden, weight, labels, ids, 4, **options).sum()
        loss.backward()

    def _from_logits(self) -> None:
        logits, labels = self._logits()
        ids, sequences = (torch.arange(len(labels)) % 4, 4) if labels.dim() == 1 else (None, None)
        logits.requires_grad_()
        view = logits[:, :-1] if self.layout == "shifted" else logits.t() if self.layout == "transposed" else logits
        sums = sequence_logprob(view, labels, ids, sequences, backend="triton", check_labels=False)
        sums.sum().backward()

    def _logits(self) -> tuple[Tensor, Tensor]:
        dtype, label, V, N = FLOATS[self.dtype], INTEGERS[self.label], self.V, self.tokens
        if self.layout == "long":
            # A file with holes: addresses for more than 2³¹ elements, and no memory behind them.
            rows = (1 << 31) // V + 64
            with tempfile.NamedTemporaryFile() as file:
                logits = torch.from_file(file.name, shared=True, size=rows * V, dtype=dtype).view(1, rows, V)
            return logits, torch.zeros(1, rows, dtype=label)
        if self.layout == "shifted":
            return torch.empty(4, N + 1, V, dtype=dtype), torch.zeros(4, N + 1, dtype=label)[:, 1:]
        shape = (V, N) if self.layout == "transposed" else (N, V)
        return torch.empty(shape, dtype=dtype), torch.zeros(N, dtype=label)


def _losses(chosen: Tensor, rejected: Tensor, index: Tensor) -> Tensor:
    return -F.logsigmoid(0.1 * (chosen - rejected))


def allow_cpu_tensors() -> None:
    """Let the Triton backend take CPU tensors, as it does in its interpreter."""
    backends.load("triton").INTERPRETED = True


USUAL = (
    Case(),
    Case(dtype="f32"),
    Case(V=256_000, softcap=True),
    Case(V=50_257),
    Case("logits", V=128_256, label="i32", layout="shifted"),
    Case("logits", layout="long"),
)
"""What runs in training, and one of each thing that changes the code."""

MORE = (Case(dtype="f16", V=32_000), Case("linear", V=128_256), Case("logits", dtype="f32", V=2_048))
"""What compiles to much the same as `USUAL`."""

FLOAT64 = (Case(dtype="f64", V=32_000), Case("logits", dtype="f64", V=32_000))

CHUNKS = tuple(Case(tokens=tokens) for tokens in (16, 17, 18, 32, 2))
"""Chunks of different sizes, as a run's first steps have them."""


def every_case() -> list[Case]:
    """Return all combinations of what a caller may pass, over the axes that matter together."""
    found = dict.fromkeys((*USUAL, *MORE, *FLOAT64, *CHUNKS))
    for dtype, label, softcap in itertools.product(FLOATS, INTEGERS, (False, True)):
        found[Case("preference", dtype, label=label, softcap=softcap)] = None
        found[Case("linear", dtype, label=label, softcap=softcap)] = None
    for dtype, layout in itertools.product(FLOATS, ("packed", "shifted", "long", "transposed")):
        found[Case("logits", dtype, layout=layout)] = None
    for dtype, V in itertools.product(FLOATS, (1, 7, 128, 2_048, 32_000, 50_257, 151_936, 152_064, 256_000, 262_144)):
        found[Case("preference", dtype, V)] = None
        found[Case("logits", dtype, V)] = None
    return list(found)
