"""The fused loss on this GPU, part by part, beside its prediction: `python -m benchmarks.kernels.predicted`.

First come the rates that the model of `benchmarks.calculated.kernels` needs: a bfloat16 product of 8,192³, and a large
copy. Then each part of a call is measured, by events around it, and the call without them. What the call takes beyond
its parts is its overhead. The predictions are for the work that the call did: its chunks, blocks and dtypes. It takes
about a minute and needs a CUDA device; the result goes to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bdpo_kernels import linear_head, linear_preference_loss
from bdpo_kernels.backends import load, resolve_backend
from benchmarks.calculated.kernels import GPU, Counted, ideal_seconds, predict
from benchmarks.kernels.measure import seconds
from benchmarks.kernels.problem import GPU_SHAPES, SHAPES, Problem, make_problem, pair_losses
from benchmarks.machine import machine
from benchmarks.written import write_rows

_RESULTS = Path(__file__).parents[1] / "results"
_REPEATS = 7
_EDGE = 8192
CASES: dict[str, dict[str, Any]] = {
    "trained head": {},
    "trained head, exact=False": {"exact": False},
    "frozen head": {"frozen": True},
}


@dataclass(frozen=True)
class Call:
    """One call of a part.

    Attributes:
        part: name of the part, as in `Prediction`.
        rows: number of tokens.
        bytes: bytes of an element of the result, or of the logits and their gradient together.
        start: time before it, or an event.
        end: time after it, or an event.
    """

    part: str
    rows: int
    bytes: int
    start: Any
    end: Any

    @property
    def seconds(self) -> float:
        """Time of the call on the device."""
        if isinstance(self.start, torch.cuda.Event):
            return self.start.elapsed_time(self.end) / 1e3
        return float(self.end - self.start)


def fused_loss(problem: Problem, exact: bool = True, frozen: bool = False) -> Callable[[], None]:
    """Return a function that computes the fused loss and its gradients, with no wait for the device."""
    B, T = problem.num_pairs, problem.shape.T
    weight = problem.weight.detach() if frozen else problem.weight

    def run() -> None:
        problem.hidden.grad = problem.weight.grad = None
        loss, _, _ = linear_preference_loss(
            problem.hidden, weight, problem.labels, problem.sequence_ids, pair_losses, num_pairs=B,
            softcap=problem.shape.softcap, lengths=[T] * (2 * B), check_labels=False, exact=exact,
        )  # fmt: skip
        loss.backward()

    return run


def observe(run: Callable[[], None], device: str) -> list[Call]:
    """Call `run`, and return every call of a part that it made, in order."""
    calls: list[Call] = []
    with _watching(calls, device):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


@contextmanager
def _watching(calls: list[Call], device: str) -> Iterator[None]:
    rows = load(resolve_backend(None, torch.device(device)))
    # Of each function: its part, and its result's rows and bytes by its arguments.
    watched: list[tuple[Any, str, str, Callable[..., tuple[int, int]]]] = [
        (linear_head, "write_logits", "logits", lambda out, *_: (len(out), out.element_size())),
        (linear_head, "hidden_product", "grad_hidden", lambda gradient, *_: (len(gradient), gradient.element_size())),
        (
            linear_head,
            "add_weight_product",
            "grad_weight",
            lambda total, gradient, *_: (len(gradient), total.element_size()),
        ),
        (
            rows,
            "logprobs_and_gradient",
            "rows",
            lambda logits, labels, transform, out: (len(logits), logits.element_size() + out.element_size()),
        ),
    ]
    with ExitStack() as stack:
        for home, name, part, size in watched:
            stack.enter_context(mock.patch.object(home, name, _timed(getattr(home, name), part, size, calls, device)))
        yield


def _timed(
    function: Callable[..., Any], part: str, size: Callable[..., tuple[int, int]], calls: list[Call], device: str
) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        start = _mark(device)
        result = function(*args)
        calls.append(Call(part, *size(*args), start, _mark(device)))
        return result

    return timed


def _mark(device: str) -> Any:
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def counted(calls: list[Call], D: int, V: int) -> Counted:
    """Return the work that `calls` did, for a head of hidden size `D` and vocabulary `V`."""

    def of(part: str) -> list[Call]:
        return [call for call in calls if call.part == part]

    chunks = of("grad_hidden")
    weight = of("grad_weight")
    return Counted(
        chunks=tuple(call.rows for call in chunks),
        blocks=tuple(call.rows for call in of("logits")),
        D=D,
        V=V,
        trains_head=bool(weight),
        wide_gradient=any(call.bytes > chunks[0].bytes for call in weight),
        logits_bytes=of("logits")[0].bytes,
        row_bytes=of("rows")[0].bytes,
        scaling_pass=False,
        waits=0,
    )


def this_gpu() -> GPU:
    """Measure the rates of this GPU that the model needs."""
    left, right = (torch.randn(_EDGE, _EDGE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _median(lambda: torch.mm(left, right), "cuda")
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), "cuda")
    facts = torch.cuda.get_device_properties(0)
    bandwidth = 2 * source.numel() * source.element_size() / copy
    return GPU(facts.name, 2 * _EDGE**3 / product, bandwidth, facts.multi_processor_count)


def _median(run: Callable[[], Any], device: str) -> float:
    for _ in range(3):
        run()
    return statistics.median(seconds(run, device) for _ in range(_REPEATS))


def compare(gpu: GPU, problem: Problem, case: str, device: str = "cuda") -> dict[str, Any]:
    """Measure a case of `CASES`, and predict it; seconds by part, and the total of each."""
    run = fused_loss(problem, **CASES[case])
    whole = _median(run, device)
    observed = [observe(run, device) for _ in range(_REPEATS)]
    step = counted(observed[0], problem.shape.D, problem.shape.V)
    expected = predict(gpu, step)
    measured = {
        part: statistics.median(sum(call.seconds for call in calls if call.part == part) for calls in observed)
        for part in ("logits", "grad_hidden", "grad_weight", "rows")
    }
    measured["overhead"] = whole - sum(measured.values())
    ideal = ideal_seconds(gpu, step)
    return {
        "shape": problem.shape.name,
        "case": case,
        "predicted_s": {**asdict(expected), "total": expected.total},
        "measured_s": {**measured, "total": whole},
        "of_cublas": {"predicted": ideal / expected.total, "measured": ideal / whole},
        "work": asdict(step),
        "gpu": asdict(gpu),
    }


def markdown(row: dict[str, Any]) -> str:
    """Return a table of one row: predicted and measured milliseconds by part, and their ratio."""
    lines = [f"| {row['shape']}, {row['case']} | predicted, ms | measured, ms | ratio |", "|---|---|---|---|"]
    for part, measured in row["measured_s"].items():
        predicted = row["predicted_s"][part]
        ratio = f"{measured / predicted:.2f}" if predicted else "–"
        lines.append(f"| {part.replace('_', ' ')} | {1e3 * predicted:.2f} | {1e3 * measured:.2f} | {ratio} |")
    share = row["of_cublas"]
    lines.append(f"| of cuBLAS | {share['predicted']:.0%} | {share['measured']:.0%} | |")
    return "\n".join(lines)


def main() -> None:
    """Measure the cases at each shape, print the tables and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen2-7b"], choices=GPU_SHAPES)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step; a multiple of 1,024")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder of the result")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and there is none; `python -m benchmarks.calculated.kernels` predicts alone")
    if options.tokens < 1 or options.tokens % 1024:
        parser.error(f"--tokens is {options.tokens}, and pairs have 1,024 tokens: give a multiple of 1,024")
    started, gpu, rows = datetime.datetime.now(datetime.UTC), this_gpu(), []
    print(f"{gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s at {_EDGE:,}³, copies at {gpu.bandwidth / 1e12:.2f} TB/s\n")
    for name in options.shapes:
        for shape in SHAPES[name]:
            problem = make_problem(replace(shape, N=options.tokens), "cuda")
            for case in CASES:
                rows.append(compare(gpu, problem, case))
                print(markdown(rows[-1]), end="\n\n", flush=True)
            del problem
    stem = f"{gpu.name.lower().replace(' ', '-')}-predicted"
    print(write_rows(options.out, stem, "benchmarks.kernels.predicted", started, machine("cuda"), rows))


if __name__ == "__main__":
    main()
