"""Kernels beside their peers: `python -m benchmarks.kernels [--device cpu|cuda] [--shapes NAME ...]`.

Every contender runs in a process of its own, in rounds, so that a drift of the machine meets all alike. What cannot run
is listed with its reason. Writes JSON and a plot to `benchmarks/results/` and prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.contenders import LINEAR, LOGITS, OTHER_LOSS
from benchmarks.kernels.problem import SHAPES, Shape
from benchmarks.kernels.report import markdown, plot
from benchmarks.machine import machine

_RESULTS = Path(__file__).parents[1] / "results"
_ON_GPU = ("qwen2-7b", "llama-3-8b", "mistral-7b", "gemma-2-9b")
_TIMEOUT_S = 900


def child(task: str, shape: Shape, contender: str, device: str, repeats: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels.measure", task, shape.name, contender, device, str(repeats)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"not_run": f"not done after {_TIMEOUT_S} s"}
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        return {"not_run": f"failed: {lines[-1] if lines else f'exit status {result.returncode}'}"[:200]}
    return json.loads(result.stdout.strip().splitlines()[-1])


def deviation(result: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest difference of loss and sampled gradients, relative to the largest value."""
    pairs = zip(result["grad_sample"], reference["grad_sample"], strict=True)
    largest = max(map(abs, reference["grad_sample"])) or 1.0
    gradient = max(abs(a - b) for a, b in pairs) / largest
    return max(gradient, abs(result["loss"] - reference["loss"]) / max(abs(reference["loss"]), 1e-12))


def compare(task: str, shape: Shape, names: list[str], device: str, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Every contender at one shape, `rounds` times each."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if not any("not_run" in run for run in runs[name]):
                runs[name].append(child(task, shape, name, device, repeats))
    rows = []
    for name, results in runs.items():
        row: dict[str, Any] = {"task": task, "shape": shape.name, "contender": name}
        row["logits_bytes"] = shape.N * shape.V * shape.dtype.itemsize
        failed = next((run["not_run"] for run in results if "not_run" in run), None)
        if failed is not None:
            rows.append(row | {"not_run": failed})
            continue
        times = [t for run in results for t in run["forward_backward_s"]]
        reference = runs["naive"][0] if "naive" in runs else results[0]
        agrees = name not in OTHER_LOSS and "not_run" not in reference
        rows.append(
            row
            | {
                "time_s": statistics.median(times),
                "times_s": times,
                "forward_s": statistics.median(run["forward_s"] for run in results),
                "extra_bytes": max(run["extra_bytes"] for run in results),
                "deviation": deviation(results[0], reference) if agrees else None,
            }
        )
        print(f"{task:7} {shape.name:18} {name:28} {rows[-1]['time_s']:.4g} s", flush=True)
    return rows


def limits(shape: Shape, device: str, rounds: int, repeats: int) -> dict[str, Any]:
    """The machine's own limits at `shape`."""
    results = [child("ceilings", shape, "-", device, repeats) for _ in range(rounds)]
    for result in results:
        if "not_run" in result:
            raise SystemExit(f"the limits at {shape.name} could not be measured: {result['not_run']}")
    return {
        "products_s": statistics.median(t for result in results for t in result["products_s"]),
        "copy_bytes_per_s": statistics.median(result["copy_bytes_per_s"] for result in results),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: the CPU set, or on a GPU the four models")
    parser.add_argument("--tasks", nargs="+", choices=("linear", "logits"), default=["linear", "logits"])
    parser.add_argument("--only", nargs="+", help="contenders to run; default all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in each round")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    options = parser.parse_args()
    names = options.shapes or (_ON_GPU if options.device == "cuda" else ("cpu",))
    unknown = set(options.only or ()) - LINEAR.keys() - LOGITS.keys()
    if unknown:
        parser.error(f"unknown contenders {sorted(unknown)}; there are {sorted(LINEAR.keys() | LOGITS.keys())}")
    options.out.mkdir(parents=True, exist_ok=True)
    started = datetime.datetime.now(datetime.UTC)
    stem = options.out / f"{started:%Y-%m-%d}-{options.device}-kernels"
    rows, ceilings = [], {}
    report = {
        "command": ["python", "-m", "benchmarks.kernels", *sys.argv[1:]],
        "date": f"{started:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine(options.device),
        "ceilings": ceilings,
        "rows": rows,
    }
    for shape in (shape for name in names for shape in SHAPES[name]):
        ceilings[shape.name] = limits(shape, options.device, options.rounds, options.repeats)
        for task in options.tasks:
            contenders = [c for c in (LINEAR if task == "linear" else LOGITS) if not options.only or c in options.only]
            rows += compare(task, shape, contenders, options.device, options.rounds, options.repeats)
            # Kept as it grows: a run over large shapes is long.
            stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not plot(rows, stem.with_suffix(".png")):
        print("no plot: matplotlib is not installed")
    print(markdown(rows, ceilings))
    print(f"Written to {stem}.json")


if __name__ == "__main__":
    main()
