"""Thread scaling on a CPU: the fused loss, and the three matrix products that it cannot do without, by threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.kernels.growth import CONTENDER

SHAPE = "1024x512x32000x128"


def counts(cores: int) -> list[int]:
    """Return the numbers of threads to measure: powers of two up to the number of cores, and that number."""
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Give PyTorch `number` threads, and what it had before back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_threads(cores: int, timed: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    """Measure with every number of threads.

    Args:
        cores: number of cores.
        timed: function that returns the seconds of the fused loss and those of the products alone.

    Returns:
        `threads`, a list, and the lists `time_s` and `products_s`, with a value for each of them.
    """
    times, products = [], []
    for number in counts(cores):
        with threads(number):
            one, other = timed()
        times.append(one)
        products.append(other)
    return {"contender": CONTENDER, "shape": SHAPE, "threads": counts(cores), "time_s": times, "products_s": products}


def markdown(found: dict[str, Any]) -> str:
    """Return a table with a row for each number of threads."""
    if "not_run" in found:
        return f"Thread scaling was not measured: {found['not_run']}"
    lines = [
        f"| threads ({found['shape']}) | {found['contender']}, s | speed-up | products alone, s | speed-up |",
        "|---|---|---|---|---|",
    ]
    first, alone = found["time_s"][0], found["products_s"][0]
    for number, time, products in zip(found["threads"], found["time_s"], found["products_s"], strict=True):
        lines.append(f"| {number} | {time:.4g} | {first / time:.2f} | {products:.4g} | {alone / products:.2f} |")
    return "\n".join(lines)
