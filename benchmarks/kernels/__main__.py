"""Kernels beside their peers: `python -m benchmarks.kernels [--device cpu|cuda] [--shapes NAME ...]`.

Without options: a small CPU run of at most two minutes, with a table, a plot and how costs grow. It writes to `runs/`.
With a device: the full grid, JSON and plot to `benchmarks/results/`. `benchmarks/README.md` describes the JSON.

Every contender runs in its own process, in rounds, so that a drift of the machine affects all equally. Contenders that
cannot run are listed with a reason. `--against` compares with an older result, and exits with status 1 if something has
become slower or larger beyond noise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.kernels import against
from benchmarks.kernels.contenders import LINEAR, LOGITS, OTHER_LOSS, missing_package
from benchmarks.kernels.growth import CONTENDER, measure_growth
from benchmarks.kernels.growth import markdown as growth_markdown
from benchmarks.kernels.problem import GPU_SHAPES, SHAPES, Shape
from benchmarks.kernels.processes import child
from benchmarks.kernels.report import markdown, plot
from benchmarks.kernels.threads import SHAPE as THREADS_SHAPE
from benchmarks.kernels.threads import markdown as threads_markdown
from benchmarks.machine import machine
from benchmarks.written import command_line

_RESULTS = Path(__file__).parents[1] / "results"
# Without contenders that compile first, import for long or need ten times as long as the others (PyTorch's own
# `linear_cross_entropy`, whose chunks are small): the whole run takes at most two minutes.
_ON_LAPTOP = ("naive", "ours, fused loss", "ours, linear logprob", "ours", "TRL selective_log_softmax")


def measured(task: str, shape: Shape, contender: str, device: str, repeats: int) -> dict[str, Any]:
    """Call `child`, except for contenders whose package is missing: no process is started for these."""
    if (package := missing_package(contender)) is not None:
        return {"not_run": f"{package} is not installed"}
    return child(task, shape.name, contender, device, repeats)


def deviation(result: dict[str, Any], reference: dict[str, Any]) -> float:
    """Return the largest difference of loss and sampled gradients, relative to the largest value."""
    pairs = zip(result["grad_sample"], reference["grad_sample"], strict=True)
    largest = max(map(abs, reference["grad_sample"])) or 1.0
    gradient = max(abs(a - b) for a, b in pairs) / largest
    return max(gradient, abs(result["loss"] - reference["loss"]) / max(abs(reference["loss"]), 1e-12))


def race(task: str, shape: Shape, names: list[str], device: str, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Measure every contender at one shape, `rounds` times each."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if not any("not_run" in run for run in runs[name]):
                run = measured(task, shape, name, device, repeats)
                runs[name].append(run)
                took = run.get("not_run") or f"{statistics.median(run['forward_backward_s']):.4g} s"
                print(f"{task:7} {shape.name:18} {name:28} {took}", flush=True)
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
    return rows


def limits(shape: Shape, device: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Measure the machine's own limits at `shape`."""
    results = [child("ceilings", shape.name, "-", device, repeats) for _ in range(rounds)]
    for result in results:
        if "not_run" in result:
            raise SystemExit(f"the limits at {shape.name} could not be measured: {result['not_run']}")
    return {
        "products_s": statistics.median(t for result in results for t in result["products_s"]),
        "copy_bytes_per_s": statistics.median(result["copy_bytes_per_s"] for result in results),
    }


def write_growth(device: str, repeats: int) -> list[dict[str, Any]]:
    """Measure how time and memory of the fused loss grow."""
    return measure_growth(lambda names: child("growth", ",".join(names), CONTENDER, device, repeats))


def compare_files(old: Path, new: dict[str, Any]) -> None:
    """Print what has changed since the result `old`.

    Raises:
        SystemExit: something is slower or larger than before, beyond noise.
    """
    before = against.read(old)
    found = against.changes(before, new)
    print("\n".join([f"**Against {old}**", "", *against.remarks(before, new), against.markdown(found)]))
    regressions = [one for one in found if one.slower or one.larger]
    if regressions:
        raise SystemExit(f"{len(regressions)} of {len(found)} are slower or larger than before, beyond noise")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a small CPU run; cuda: the full grid")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: laptop, cpu or the four models")
    parser.add_argument("--tasks", nargs="+", choices=("linear", "logits"), default=["linear", "logits"])
    parser.add_argument("--only", nargs="+", help="contenders to run; default: all; on a laptop a few")
    parser.add_argument("--rounds", type=int, help="default: 2, on a laptop 1")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in each round")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, help="measure growth; default: on a laptop")
    parser.add_argument("--threads", action="store_true", help="measure the fused loss by number of threads; CPU only")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results, on a laptop runs")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="compare with an older result")
    parser.add_argument("--load", type=Path, metavar="NEW.json", help="with --against: compare this one, measure none")
    options = parser.parse_args()
    if options.load and not options.against:
        parser.error("--load names the newer of two results; give the older one with --against")
    if options.threads and options.device == "cuda":
        parser.error("--threads measures the threads of a CPU; leave it out, or take --device cpu")
    unknown = set(options.only or ()) - LINEAR.keys() - LOGITS.keys()
    if unknown:
        parser.error(f"unknown contenders {sorted(unknown)}; there are {sorted(LINEAR.keys() | LOGITS.keys())}")
    # No device and no shapes: two minutes on a laptop.
    laptop = options.device is None and options.shapes is None
    options.device = options.device or "cpu"
    options.shapes = options.shapes or (("laptop",) if laptop else GPU_SHAPES if options.device == "cuda" else ("cpu",))
    options.rounds = options.rounds or (1 if laptop else 2)
    options.growth = laptop if options.growth is None else options.growth
    options.out = options.out or (Path("runs") if laptop else _RESULTS)
    if laptop and not options.only:
        options.only = list(_ON_LAPTOP)
    return options


def main() -> None:
    """Run the command line."""
    options = parse()
    if options.load:
        compare_files(options.against, against.read(options.load))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    started = datetime.datetime.now(datetime.UTC)
    stem = options.out / f"{started:%Y-%m-%d}-{options.device}-kernels"
    rows, ceilings = [], {}
    report = {
        "command": command_line("benchmarks.kernels"),
        "date": f"{started:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine(options.device),
        "ceilings": ceilings,
        "rows": rows,
        "growth": [],
    }

    def save() -> None:
        # Saved as it grows: a run over large shapes is long.
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for shape in (shape for name in options.shapes for shape in SHAPES[name]):
        ceilings[shape.name] = limits(shape, options.device, options.rounds, options.repeats)
        for task in options.tasks:
            contenders = [c for c in (LINEAR if task == "linear" else LOGITS) if not options.only or c in options.only]
            rows += race(task, shape, contenders, options.device, options.rounds, options.repeats)
            save()
    if options.growth:
        report["growth"] = write_growth(options.device, options.repeats)
        save()
    if options.threads:
        report["threads"] = child("threads", THREADS_SHAPE, CONTENDER, options.device, options.repeats)
        save()
    if not plot(rows, report["growth"], stem.with_suffix(".png")):
        print('no plot: matplotlib is not installed; pip install -e ".[bench]"')
    print(markdown(rows, ceilings))
    if report["growth"]:
        print(growth_markdown(report["growth"]))
    if options.threads:
        print(threads_markdown(report["threads"]))
    print(f"Written to {stem}.json")
    if options.against:
        compare_files(options.against, report)


if __name__ == "__main__":
    main()
