"""One contender in its own process: `python -m benchmarks.kernels.measure TASK SHAPE CONTENDER DEVICE REPEATS`.

Prints JSON. `processes` starts one for each measurement.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contenders import LINEAR, LOGITS, NotRunError
from benchmarks.kernels.problem import Problem, find_shape, make_problem
from benchmarks.kernels.threads import by_threads
from benchmarks.machine import process_memory, usable_cores


def seconds(function: Callable[[], Any], device: str) -> float:
    """Return the time of one call, including the device's work."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def extra_peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Return the peak memory during one call, minus the memory in use before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Linux: resets the high-water mark of the resident set.
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("VmRSS")
    function()
    return process_memory("VmHWM") - before


def measure(forward: Callable[[], Tensor], leaves: list[Tensor], device: str, repeats: int) -> dict[str, Any]:
    """Measure times, memory and values of one contender."""

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def both() -> Tensor:
        clear()
        loss = forward()
        loss.backward()
        return loss

    loss = both().item()
    sample = [leaf.grad.flatten()[:: max(1, leaf.numel() // 64)].float() for leaf in leaves if leaf.grad is not None]
    result: dict[str, Any] = {"loss": loss, "grad_sample": torch.cat(sample).tolist()}
    clear()
    grads = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    result["extra_bytes"] = extra_peak_bytes(both, device) - grads
    clear()
    result["forward_backward_s"] = [seconds(both, device) for _ in range(repeats)]
    clear()
    result["forward_s"] = seconds(forward, device)
    return result


def linear_task(problem: Problem, contender: str, device: str, repeats: int) -> dict[str, Any]:
    """Measure the way from hidden states to the loss and back."""
    function = LINEAR[contender]
    return measure(lambda: function(problem), [problem.hidden, problem.weight], device, repeats)


def logits_task(problem: Problem, contender: str, device: str, repeats: int) -> dict[str, Any]:
    """Measure the way from logits to the log-probabilities and back."""
    with torch.no_grad():
        logits = problem.hidden @ problem.weight.t()
    logits.requires_grad_()
    function = LOGITS[contender]
    return measure(lambda: function(problem, logits), [logits], device, repeats)


def three_products(hidden: Tensor, weight: Tensor, logits: Tensor) -> Callable[[], None]:
    """Return a function that computes the three matrix products of a training step at the LM head."""

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    return products


def thread_scaling(problem: Problem, contender: str, repeats: int) -> dict[str, Any]:
    """Measure the fused loss and the products alone with every number of threads, the fastest of `repeats` each."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    products = three_products(hidden, weight, hidden @ weight.t())

    def both() -> None:
        problem.hidden.grad = problem.weight.grad = None
        LINEAR[contender](problem).backward()

    def timed() -> tuple[float, float]:
        both()
        products()
        fastest = [min(seconds(function, "cpu") for _ in range(repeats)) for function in (both, products)]
        return fastest[0], fastest[1]

    return by_threads(usable_cores(), timed)


def ceilings(problem: Problem, device: str, repeats: int) -> dict[str, Any]:
    """Measure the machine's limits: the three products of a training step alone, and a copy."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden @ weight.t()

    products = three_products(hidden, weight, logits)
    target = torch.empty_like(logits)
    for _ in range(2):
        products()
        target.copy_(logits)
    copy = statistics.median(seconds(lambda: target.copy_(logits), device) for _ in range(max(5, repeats)))
    return {
        "products_s": [seconds(products, device) for _ in range(repeats)],
        "copy_bytes_per_s": 2 * logits.numel() * logits.element_size() / copy,
    }


def measured(task: str, shape: str, contender: str, device: str, repeats: int) -> dict[str, Any]:
    """Measure `contender` at a shape, or at several for "growth"; the result has `not_run` if it cannot run."""
    try:
        problems = (make_problem(find_shape(name), device) for name in shape.split(","))
        if task == "growth":
            return {"points": [linear_task(problem, contender, device, repeats) for problem in problems]}
        if task == "threads":
            return thread_scaling(next(problems), contender, repeats)
        if task == "ceilings":
            return ceilings(next(problems), device, repeats)
        run = linear_task if task == "linear" else logits_task
        return run(next(problems), contender, device, repeats)
    except (NotRunError, ImportError) as error:
        return {"not_run": f"{error}"}
    except torch.OutOfMemoryError:
        return {"not_run": "out of memory"}


def main() -> None:
    """Run the command line."""
    task, shape, contender, device, repeats = sys.argv[1:6]
    print(json.dumps(measured(task, shape, contender, device, int(repeats))))


if __name__ == "__main__":
    main()
