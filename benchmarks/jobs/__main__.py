"""A whole alignment job, ours and TRL's: `python -m benchmarks.jobs [--device cpu|cuda] [--mixes NAME ...]`.

All trainers have the same model, pairs, order, precision, batch of pairs and optimiser. Each runs in its own process,
in alternating rounds, so that a drift of the machine affects all equally. After each round the command writes JSON to
`benchmarks/results/` and prints Markdown, of all rounds so far. `--curve K` validates K times during training and
compares the time to the same held-out loss.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.child import result_of
from benchmarks.jobs.problem import MIXES, MODELS, REAL, DPOProblem, build
from benchmarks.jobs.real import build_real
from benchmarks.jobs.trainers import CONTENDERS
from benchmarks.machine import machine
from benchmarks.written import command_line

_RESULTS = Path(__file__).parents[1] / "results"
_TIMEOUT_S = 3600
_SAME_LOSS_STEPS = 20
_MB = 1 << 20
_LIVE, _PRECOMPUTED = "TRL DPO, live reference", "TRL DPO, precomputed reference"


def child(contender: str, folder: Path, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """Run one job in its own process; `prefix` is the command that starts it, as `taskset` does."""
    command = [*prefix, sys.executable, "-m", "benchmarks.jobs.trainers", contender, str(folder)]
    return result_of(command, _TIMEOUT_S, 300)


def compare(
    problem: DPOProblem,
    names: list[str],
    rounds: int,
    real: tuple[str, str] | None = None,
    prefix: Sequence[str] = (),
    after_round: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Run every contender on one problem.

    Args:
        problem: the input of all.
        names: names of the contenders.
        rounds: number of runs of each.
        real: folder of a published model and file of published pairs; None: the problem's random ones.
        prefix: command that starts each run.
        after_round: function that is called with the rows after each round but the last, so that a stop loses one.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if real is None:
            build(problem, Path(folder))
        else:
            problem = build_real(problem, Path(real[0]), real[1], Path(folder))
        for turn in range(rounds):
            for name in names:
                if not any("not_run" in run for run in runs[name]):
                    runs[name].append(child(name, Path(folder), prefix))
                    seconds = runs[name][-1].get("job_s")
                    print(f"{problem.mix:15} {name:32} {seconds and round(seconds, 1)} s", flush=True)
            rows = [_row(problem, name, results) for name, results in runs.items()]
            if turn + 1 < rounds:
                after_round(rows)
    return rows


def _row(problem: DPOProblem, name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"problem": asdict(problem), "contender": name}
    failed = next((run["not_run"] for run in results if "not_run" in run), None)
    if failed is not None:
        return row | {"not_run": failed}
    first = results[0]
    job = statistics.median(run["job_s"] for run in results)
    return row | {
        "job_s": job,
        "jobs_s": [run["job_s"] for run in results],
        "scoring_s": statistics.median(run["scoring_s"] for run in results),
        "training_s": statistics.median(run["training_s"] for run in results),
        "pairs_per_s": first["num_pairs"] / job,
        "tokens_per_s": first["num_tokens"] / job,
        "training_pairs_per_s": first["num_pairs"] / statistics.median(run["training_s"] for run in results),
        "peak_bytes": max(run["peak_bytes"] for run in results),
        "losses": first["losses"][:_SAME_LOSS_STEPS],
        "curve": first["curve"],
        "row_layout": first.get("row_layout"),
    }


def loss_difference(rows: list[dict[str, Any]]) -> float | None:
    """Return the largest difference of our DPO's losses from TRL's, over the first steps of the same batches."""
    losses = {row["contender"]: row["losses"] for row in rows if "losses" in row}
    theirs = losses.get(_PRECOMPUTED) or losses.get(_LIVE)
    mine = losses.get("ours, DPO")
    if not mine or not theirs or len(mine) != len(theirs):
        return None
    # Of numpy, as `max` loses a NaN that is not the first.
    return float(np.max(np.abs(np.subtract(mine, theirs))))


def seconds_to(loss: float, curve: list[list[float]]) -> float | None:
    """Return when a curve of (seconds, loss) first reaches `loss`, by linear interpolation."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (t0, l0), (t1, l1) in itertools.pairwise(curve):
        if l1 <= loss:
            return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
    return None


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return one line per contender and problem, with ratios to both of TRL's modes on the same problem."""
    lines = [
        "| lengths | trainer | job, s | pairs/s | tokens/s | × TRL live | × TRL precomputed | peak MB | of live's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        problem = row["problem"]
        spread = f", σ {problem['spread']:g}" if problem["spread"] else ""
        lengths = "pairs" if problem["mix"] == REAL else "/".join(map(str, MIXES[problem["mix"]]))
        head = f"| {problem['mix']} {lengths}{spread} | {row['contender']} |"
        if "not_run" in row:
            lines.append(f"{head} not run: {row['not_run']} | | | | | | |")
            continue
        peers = {r["contender"]: r for r in rows if r["problem"] == problem and "job_s" in r}
        live, precomputed = peers.get(_LIVE), peers.get(_PRECOMPUTED)
        speed = [f"{p['job_s'] / row['job_s']:.2f}" if p else "–" for p in (live, precomputed)]
        memory = f"{row['peak_bytes'] / live['peak_bytes']:.0%}" if live else "–"
        lines.append(
            f"{head} {row['job_s']:.1f} | {row['pairs_per_s']:.2f} | {row['tokens_per_s']:,.0f} | {speed[0]} | "
            f"{speed[1]} | {row['peak_bytes'] / _MB:,.0f} | {memory} |"
        )
    return "\n".join(lines)


def curve_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return times to the same held-out loss: the highest of the trainers' lowest ones, which all of them reach."""
    curves = {row["contender"]: row["curve"] for row in rows if row.get("curve")}
    if not curves:
        return []
    target = max(min(loss for _, loss in curve) for curve in curves.values())
    reached = {name: seconds_to(target, curve) for name, curve in curves.items()}
    return [
        f"{name}: held-out DPO loss {target:.4f} after {seconds:.1f} s" for name, seconds in reached.items() if seconds
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, help="default: small on a CPU, qwen2-7b on a GPU")
    parser.add_argument("--real", nargs=2, metavar=("MODEL", "PAIRS"), help="a model's folder and HH-RLHF's dialogues")
    parser.add_argument("--window", type=int, default=1024, help="longest sequence of --real, in tokens")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--spread", nargs="+", type=float, default=[0.0, 0.5], help="σ of the log-normal lengths")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the lengths")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: float32 on a CPU")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--curve", type=int, default=0, help="validations on the way, on as many held-out pairs again")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--prefix", type=shlex.split, default=[], help="command that starts each run, such as taskset")
    parser.add_argument("--tag", default="", help="goes into the result's name")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    problem = DPOProblem(
        model=options.model or ("qwen2-7b" if on_gpu else "small"),
        scale=options.scale,
        num_pairs=options.pairs,
        num_held_out=options.pairs if options.curve else 0,
        batch_size=options.batch_size,
        precision=options.precision or ("bfloat16" if on_gpu else "float32"),
        lora=options.lora,
        learning_rate=options.learning_rate,
        device=options.device,
        curve=options.curve,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    started = datetime.datetime.now(datetime.UTC)
    tag = f"-{options.tag}" if options.tag else ""
    path = options.out / f"{started:%Y-%m-%d}-{options.device}-end-to-end{tag}.json"
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "command": command_line("benchmarks.jobs"),
        "date": f"{started:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine(options.device),
        "rows": rows,
        "loss_differences": [],
    }
    problems = [replace(problem, mix=mix, spread=spread) for mix in options.mixes for spread in options.spread]
    if options.real:
        problems = [replace(problem, window=options.window)]

    def save(more: list[dict[str, Any]]) -> None:
        # Saved as it grows, because the slow trainers take long.
        path.write_text(json.dumps(report | {"rows": rows + more}, indent=1) + "\n", encoding="utf-8")
        if more:
            print(markdown(more), flush=True)

    for each in problems:
        found = compare(each, options.only, options.rounds, options.real, options.prefix, save)
        rows += found
        difference = loss_difference(found)
        report["loss_differences"].append(difference)
        save([])
        if difference is not None:
            print(f"Our DPO's losses differ from TRL's by {difference:.1e} at most, over the first steps")
        print("\n".join(curve_lines(found)))
    print(markdown(rows))
    if np.isnan([d for d in report["loss_differences"] if d is not None]).any():
        raise SystemExit("a loss is not a number")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
