"""Predicted time of the fused preference loss on one GPU: `python -m benchmarks.calculated.kernels`.

Nothing here is measured, and everything it prints is called a prediction. The model counts:

- Products, by tiles. An output of M × N is cut into tiles; as many tiles as there are multiprocessors run at once, and
  an incomplete last wave takes as long as a full one. The rate is cuBLAS's measured rate at 8,192³.
- Bytes, at the memory's measured rate. Traffic beyond a bfloat16 result (a float32 result, or one added to the existing
  contents) is hidden behind the product's arithmetic only in part.
- Kernel launches and waits for the device, at a fixed cost each.

Shapes: N tokens; D hidden size; V vocabulary; n tokens of one chunk.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields, replace

# Tile shapes that cuBLAS chooses from, and the share of the rate that each can reach.
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.92), (64, 256, 0.85))
_HALF, _SINGLE = 2, 4
# The assumption that matters most: the share of a product's extra traffic that is not hidden.
EXPOSED = 0.5
# Share of the memory's rate that a kernel over rows of logits reaches.
ROW_KERNELS = 0.92
LAUNCH_S = 1.0e-6
WAIT_S = 60e-6
"""Host time until the device has work again after a wait for it."""


@dataclass(frozen=True)
class GPU:
    """A device, described by rates that others have measured on it.

    Attributes:
        name: name of the device.
        flops: operations per second of a bfloat16 product of 8,192³.
        bandwidth: bytes per second of a large copy, both directions added.
        multiprocessors: number of multiprocessors.
    """

    name: str
    flops: float
    bandwidth: float
    multiprocessors: int = 132

    @property
    def tile_rate(self) -> float:
        """Operations per second of one multiprocessor, such that 8,192³ gives `flops`."""
        tiles = (8192 // 128) * (8192 // 256)
        full = tiles / self.multiprocessors / math.ceil(tiles / self.multiprocessors)
        return self.flops / self.multiprocessors / full


H100 = GPU("H100 SXM", 790e12, 3.0e12)
H200 = GPU("H200", 788e12, 4.3e12)


@dataclass(frozen=True)
class Counted:
    """Counts of the work in one step of the fused loss.

    Attributes:
        chunks: number of tokens in each chunk.
        D: hidden size.
        V: vocabulary.
        mixed: true for float32 weights under bfloat16 autocast, false for bfloat16 weights.
        trains_head: true if the head's weight needs a gradient.
        wide_gradient: true if the weight's gradient is accumulated in float32 and cast at the end.
        row_bytes: bytes of each logit that kernels over rows read and write, beyond those of the products.
        logits_bytes: bytes of each logit that the first product writes.
        scaling_pass: true if the weight's gradient is multiplied by the gradient of the loss.
        launches: number of kernel launches.
        waits: number of times that the host waits for the device.
        blocks: number of tokens in each block of logits, if that is not a chunk.
    """

    chunks: tuple[int, ...]
    D: int
    V: int
    mixed: bool = False
    trains_head: bool = True
    wide_gradient: bool = True
    row_bytes: int = 3 * _HALF
    logits_bytes: int = _HALF
    scaling_pass: bool = True
    launches: int = 90
    waits: int = 4
    blocks: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens N."""
        return sum(self.chunks)


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one step, by kind of work.

    Attributes:
        logits: first product, hidden states times the weight.
        grad_hidden: second product.
        grad_weight: third product, with the traffic of its accumulation.
        rows: kernels over rows of logits.
        casts: casts of the weight to bfloat16, or of its gradient from float32.
        scaling: multiplication of the weight's gradient by the gradient of the loss.
        overhead: launches and waits.
    """

    logits: float
    grad_hidden: float
    grad_weight: float
    rows: float
    casts: float
    scaling: float
    overhead: float

    @property
    def total(self) -> float:
        """Sum of all parts: nothing overlaps."""
        return sum(getattr(self, field.name) for field in fields(self))


def product_seconds(gpu: GPU, M: int, N: int, K: int, out_bytes: int = _HALF, adds: bool = False) -> float:
    """Predict the time of an (M, K) by (K, N) product in bfloat16.

    Args:
        gpu: device.
        M: rows of the result.
        N: columns of the result.
        K: length of the sums.
        out_bytes: bytes of an element of the result.
        adds: whether to add the product to the existing contents of the result.
    """
    best = math.inf
    for rows, columns, share in _TILES:
        tiles = math.ceil(M / rows) * math.ceil(N / columns)
        # If there are few tiles, cuBLAS splits the sums and adds the parts in float32.
        for split in (1, 2, 4):
            waves = math.ceil(tiles * split / gpu.multiprocessors)
            seconds = waves * 2 * rows * columns * K / split / (gpu.tile_rate * share)
            parts = 0 if split == 1 else split * M * N * 2 * _SINGLE
            best = min(best, seconds + parts / gpu.bandwidth)
    written = M * N * out_bytes * (2 if adds else 1)
    extra = written - M * N * _HALF
    traffic = (M * K + K * N) * _HALF + written
    return max(best + EXPOSED * max(0, extra) / gpu.bandwidth, traffic / gpu.bandwidth)


def predict(gpu: GPU, step: Counted) -> Prediction:
    """Predict the time of one step of the fused loss, forward and backward."""
    D, V = step.D, step.V
    accumulated = step.mixed or (step.wide_gradient and step.trains_head)
    width = _SINGLE if accumulated else _HALF
    grad_weight = (
        product_seconds(gpu, V, D, n, width, adds=i > 0) if step.trains_head else 0.0 for i, n in enumerate(step.chunks)
    )
    casts = 0.0
    if step.mixed or (step.trains_head and width == _SINGLE):
        casts = V * D * (_HALF + _SINGLE) / gpu.bandwidth
    owned = _SINGLE if step.mixed else _HALF
    scaled = step.scaling_pass and step.trains_head
    return Prediction(
        logits=sum(product_seconds(gpu, n, V, D, step.logits_bytes) for n in step.blocks or step.chunks),
        grad_hidden=sum(product_seconds(gpu, n, D, V) for n in step.chunks),
        grad_weight=sum(grad_weight),
        rows=step.row_bytes * step.tokens * V / gpu.bandwidth / ROW_KERNELS,
        casts=casts,
        scaling=2 * V * D * owned / gpu.bandwidth if scaled else 0.0,
        overhead=step.launches * LAUNCH_S + step.waits * WAIT_S,
    )


def ideal_seconds(gpu: GPU, step: Counted) -> float:
    """Return the time of the products alone at cuBLAS's own rate: 6·N·V·D operations, 4 with a frozen head."""
    return (6 if step.trains_head else 4) * step.tokens * step.V * step.D / gpu.flops


QWEN2_7B = Counted((3072, 1024), D=3584, V=152_064)
_ONE = replace(QWEN2_7B, chunks=(4096,))
_UNSCALED = replace(_ONE, scaling_pass=False)
_NARROW = replace(_UNSCALED, wide_gradient=False)
ROUNDED = replace(_NARROW, row_bytes=2 * _HALF, waits=0)
"""The same with `exact=False`: logits rounded to bfloat16."""
PRESENT = replace(ROUNDED, row_bytes=_SINGLE + _HALF, logits_bytes=_SINGLE, blocks=(1408, 1408, 1280))
"""What the code does today: float32 logits in blocks, read once and replaced by a gradient in bfloat16."""
STEPS = {
    "0.1.0: two chunks, accumulated in float32, scaled": QWEN2_7B,
    "the same, bf16-mixed": replace(QWEN2_7B, mixed=True),
    "one chunk": _ONE,
    "+ no scaling pass": _UNSCALED,
    "+ gradient in the weight's dtype": _NARROW,
    "+ rows in one kernel": replace(_NARROW, row_bytes=2 * _HALF),
    "+ no waits: today with `exact=False`": ROUNDED,
    "today: logits in float32": PRESENT,
}
"""Qwen2-7B's head over 4,096 tokens, change by change."""


def table(gpu: GPU, steps: dict[str, Counted]) -> str:
    """Return a Markdown table of predictions in milliseconds."""
    names = [field.name for field in fields(Prediction)]
    lines = [
        f"| {gpu.name}, predicted, ms | {' | '.join(name.replace('_', ' ') for name in names)} | total | of cuBLAS |",
        "|---" * (len(names) + 3) + "|",
    ]
    for label, step in steps.items():
        found = predict(gpu, step)
        parts = " | ".join(f"{1e3 * getattr(found, name):.2f}" for name in names)
        share = ideal_seconds(gpu, step) / found.total
        lines.append(f"| {label} | {parts} | {1e3 * found.total:.1f} | {share:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Print the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("PREDICTIONS, not measurements: see the head of this file for what they assume.\n")
    print("\n\n".join(table(gpu, STEPS) for gpu in (H100, H200)))


if __name__ == "__main__":
    main()
