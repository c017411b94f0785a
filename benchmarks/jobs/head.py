"""Cost of reading log-probabilities through the fused head: `python -m benchmarks.jobs.head [--model M --data FILE]`.

The scoring pass reads log-probabilities from the hidden states before the LM head, a chunk of logits at a time. Where a
trial finds that it may not, it falls back on the model's own logits; this path is forced here, and both are compared on
the same pairs. They alternate after every few pairs, in turns that begin with either, so that a drift of the machine
meets both. Then peak memory is measured, on the longest pairs. The model is the embedded one by default, with its
held-out pairs; texts are never printed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import random
import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bdpo_pl import embedded
from bdpo_pl.data.files import read_file
from bdpo_pl.data.loading import load_pairs
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.forward.responses import own_logits
from bdpo_pl.models.loading import ModelSource, load_model, load_tokenizer
from bdpo_pl.scoring.scores import ScoreTable
from bdpo_pl.scoring.scoring_pass import score_pairs
from benchmarks.kernels.measure import extra_peak_bytes, seconds
from benchmarks.machine import machine
from benchmarks.written import write_rows

_RESULTS = Path(__file__).parents[1] / "results"
_MB = 1 << 20
_M_MMAP_THRESHOLD = -3  # of malloc.h
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FUSED, LOGITS = "fused head", "model's own logits"
PATHS = (FUSED, LOGITS)


def read_pairs(options: argparse.Namespace) -> PairTable:
    """Draw pairs that fit the window, the same for the same file, model and number."""
    tokenizer = PairTokenizer(load_tokenizer(ModelSource(options.model)))
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for _, row in read_file(options.data)]
        drawn = Path(folder) / "pairs.jsonl"
        random.Random(0).shuffle(rows)  # noqa: S311 - a sample, no secret
        # More than needed, because some do not fit the window.
        drawn.write_text("".join(json.dumps(row) + "\n" for row in rows[: 8 * options.pairs]), encoding="utf-8")
        table, _ = load_pairs("train", str(drawn), tokenizer, Truncation(options.max_length, "drop"))
    return table.select(np.arange(min(options.pairs, len(table))))


def path_of(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """Return the context in which `model` is read by the path of that name."""
    return own_logits(model) if name == LOGITS else nullcontext()


def score(model: nn.Module, table: PairTable, indices: np.ndarray, layout: RowLayout, path: str) -> ScoreTable:
    """Score the pairs at `indices` by one of the paths."""
    with path_of(model, path):
        return score_pairs(model, table, indices, layout=layout)


def turns(
    model: nn.Module, table: PairTable, layout: RowLayout, options: argparse.Namespace
) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of each turn by path, and the largest difference of a log-probability between the paths."""
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    groups = np.array_split(np.arange(len(table)), max(1, len(table) // options.turn))
    largest = 0.0
    for path in PATHS:
        score(model, table, groups[0][:2], layout, path)  # uncounted: the comparison of the heads, and the first calls
    for number in range(options.rounds * len(groups)):
        group = groups[number % len(groups)]
        found: dict[str, ScoreTable] = {}

        def turn(path: str, group: np.ndarray = group, found: dict[str, ScoreTable] = found) -> None:
            found[path] = score(model, table, group, layout, path)

        for path in PATHS if number % 2 == 0 else PATHS[::-1]:
            times[path].append(seconds(partial(turn, path), options.device))
        print(f"turn {number + 1}:", {path: round(values[-1], 2) for path, values in times.items()}, flush=True)
        largest = max(largest, float(np.abs(found[FUSED].reference - found[LOGITS].reference).max()))
    return times, largest


def longest(table: PairTable, count: int) -> np.ndarray:
    """Return the indices of the pairs with the most tokens."""
    totals = table.prompt_lengths + table.trained_lengths.sum(axis=0)
    return np.argsort(-totals, kind="stable")[:count]


def hand_memory_back() -> None:
    """Make glibc hand back what is free, and each large tensor when it is freed, so that none hides in either."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MB)
    libc.malloc_trim(0)


def memory(model: nn.Module, table: PairTable, layout: RowLayout, options: argparse.Namespace) -> dict[str, int]:
    """Return by path the peak bytes of scoring the longest pairs, beyond what was there before."""
    pairs = longest(table, options.memory_pairs)
    found = {}
    for path in PATHS:
        run = partial(score, model, table, pairs, layout, path)
        run()  # unmeasured: what only a first call allocates
        if options.device == "cpu":
            hand_memory_back()
        found[path] = extra_peak_bytes(run, options.device)
    return found


def markdown(row: dict[str, Any]) -> str:
    """Return the result as a table: a line for each path."""
    ratios = sorted(a / b for a, b in zip(row["turns_s"][FUSED], row["turns_s"][LOGITS], strict=True))
    lines = [
        "| path | seconds | extra memory, MB |",
        "|---|---|---|",
        *(f"| {p} | {sum(row['turns_s'][p]):.1f} | {row['extra_bytes'][p] / _MB:,.0f} |" for p in PATHS),
        "",
        f"Time, fused / own logits, by turn: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}, n = {len(ratios)}. "
        f"Log-probabilities differ by at most {row['largest_difference']:.1e} nats.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument(
        "--model", default=str(embedded.MODEL_DIR), help="folder or hub name; default: the embedded model"
    )
    parser.add_argument("--data", type=Path, default=embedded.HELD_OUT_FILE, help="JSONL of pairs, also gzipped")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=512, help="tokens; longer pairs are left out")
    parser.add_argument("--turn", type=int, default=8, help="pairs of a turn")
    parser.add_argument("--memory-pairs", type=int, default=32, help="longest pairs, of which memory is measured")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--tag", default="", help="goes into the result's name")
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    told = machine(options.device)  # now, because the commit may be another one at the end
    table = read_pairs(options)
    model = load_model(ModelSource(options.model), _DTYPES[options.dtype]).to(options.device)
    layout = choose_layout(model, table)
    times, difference = turns(model, table, layout, options)
    head = model.get_output_embeddings()  # type: ignore[operator]
    row = {
        "model": Path(options.model).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden_size": head.weight.shape[1],
        "vocabulary": head.weight.shape[0],
        "dtype": options.dtype,
        "data": options.data.name,
        "pairs": len(table),
        "tokens": int(table.prompt_lengths.sum() + table.trained_lengths.sum()),
        "layout": layout.value,
        "turns_s": times,
        "extra_bytes": memory(model, table, layout, options),
        "largest_difference": difference,
    }
    tag = f"-{options.tag}" if options.tag else ""
    path = write_rows(options.out, f"{options.device}-head{tag}", "benchmarks.jobs.head", started, told, [row])
    print(markdown(row))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
