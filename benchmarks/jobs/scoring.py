"""Cost of the scoring pass: `python -m benchmarks.jobs.scoring [--model small] [--mixes NAME ...]`.

Four scorings per pair (reference log-probabilities and comprehension) with a shared prompt are compared with the same
in separate rows, and with one epoch's forward pass over both sequences of each pair, as run by a trainer without
sharing.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.forward.masks import set_attention
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.loading import ModelSource, load_model
from bdpo_pl.scoring.scoring_pass import score_pairs
from benchmarks.jobs.problem import MIXES, MODELS, DPOProblem, build
from benchmarks.machine import machine
from benchmarks.written import write_rows

_RESULTS = Path(__file__).parents[1] / "results"


def random_table(mix: str, num_pairs: int, vocabulary: int) -> PairTable:
    """Return pairs of random tokens with exactly the mix's lengths, and a null prompt of ten tokens."""
    rng = np.random.default_rng(0)
    prompt, response = MIXES[mix]

    def ids(length: int) -> list[int]:
        return rng.integers(2, vocabulary, length).tolist()

    pairs = [PreferencePair(ids(prompt), ids(response), ids(response)) for _ in range(num_pairs)]
    return PairTable.from_pairs(pairs, ids(10))


def epoch_forward(model: torch.nn.Module, table: PairTable, batch_size: int) -> None:
    """Run one forward pass over all pairs in separate rows, keeping what a backward pass needs, as in training."""
    device = next(model.parameters()).device
    for start in range(0, len(table), batch_size):
        pairs = [table[i] for i in range(start, min(start + batch_size, len(table)))]
        response_logps(model, lay_out(pair_documents(pairs), RowLayout.SPLIT, 0).to(device), whole=True)


def timed(
    functions: dict[str, Callable[[], Any]], rounds: int, device: str, prepare: Callable[[str], None]
) -> dict[str, float]:
    """Return the median seconds of each function, in alternating rounds, after an uncounted one.

    Args:
        functions: functions by their names.
        rounds: number of counted rounds.
        device: `cpu` or `cuda`.
        prepare: function that is called with the name before each run, outside the measured time.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            prepare(name)
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_RESULTS)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        build(DPOProblem(model=options.model, precision=str(dtype).removeprefix("torch."), num_pairs=1), Path(folder))
        model = load_model(ModelSource(f"{folder}/model"), dtype).to(options.device)
    plain = model.config._attn_implementation
    rows = []
    for mix in options.mixes:
        table = random_table(mix, options.pairs, MODELS[options.model]["vocab_size"])
        layout = choose_layout(model, table)
        chosen = model.config._attn_implementation
        seconds = timed(
            {
                "four scorings, shared": lambda t=table, kind=layout: score_pairs(model, t, range(len(t)), layout=kind),
                "four scorings, rows of their own": lambda t=table: score_pairs(model, t, range(len(t))),
                "epoch's forward, rows of their own": lambda t=table: epoch_forward(model, t, options.batch_size),
            },
            options.rounds,
            options.device,
            # Without sharing, a trainer has plain attention.
            lambda name, use=chosen: set_attention(model, use if name == "four scorings, shared" else plain),
        )
        rows.append({"mix": mix, "layout": layout.value, "pairs": len(table), "seconds": seconds})
        ratio = seconds["four scorings, shared"] / seconds["epoch's forward, rows of their own"]
        print(f"{mix:15} {ratio:.2f} × an epoch's forward", {name: round(value, 2) for name, value in seconds.items()})
    stem = f"{options.device}-scoring"
    path = write_rows(options.out, stem, "benchmarks.jobs.scoring", started, machine(options.device), rows)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
