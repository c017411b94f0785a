"""Where the time of training goes: `python -m benchmarks.jobs.profile --model FOLDER --data FILE`.

A few steps of Balanced DPO are profiled, in the process and with the settings that `fit` has, and each operation's own
time is counted to one kind of work. The rate of the products is compared with that of a product alone, of the size
that most of them have, in the same process. Texts are never printed.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch.autograd.profiler_util import FunctionEvent

from bdpo_pl import PreferenceDataModule, PreferenceModule
from bdpo_pl.losses import BalancedDPOLoss
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from benchmarks.machine import machine
from benchmarks.written import write_rows

_RESULTS = Path(__file__).parents[1] / "results"
_LAYERS, _HEAD, _ATTENTION = "products of the layers", "products of the LM head", "attention"
_UPDATE, _REST = "update of the weights", "everything else"
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
KINDS = (_LAYERS, _HEAD, _ATTENTION, _UPDATE, _REST)


class MarkedAdamW(torch.optim.AdamW):
    """AdamW whose own work is told apart from the forward and backward pass within its step."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Compute the gradients, then update under a name that the profile shows."""
        loss = closure() if closure is not None else None
        with torch.profiler.record_function(_UPDATE):
            super().step()
        return loss


class Profiled(L.Callback):
    """Profiles all steps but the first, which has trials and first calls in it.

    Attributes:
        events: the operations.
        seconds: duration of the profiled steps.
        tokens: tokens in their batches, without padding.
        positions: the same with padding.
    """

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(record_shapes=True, with_flops=True)
        self.seconds = 0.0
        self.tokens = self.positions = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        """Begin with the second batch."""
        if index == 1:
            self.profile.start()
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Count the batch."""
        if index:
            self.seconds += time.perf_counter() - self.start
            self.tokens += batch.num_tokens
            self.positions += batch.sequences.input_ids.numel()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """End with the last batch."""
        self.profile.stop()

    @property
    def events(self) -> Iterable[FunctionEvent]:
        """Return the profiled operations."""
        return self.profile.events() or ()


def kind_of(event: FunctionEvent, vocabulary: int) -> str:
    """Return the kind of work, one of `KINDS`, that an operation belongs to."""
    ancestor: FunctionEvent | None = event
    while ancestor is not None:
        if ancestor.name == _UPDATE:
            return _UPDATE
        ancestor = ancestor.cpu_parent
    if "scaled_dot_product" in event.name:
        return _ATTENTION
    if event.name in _PRODUCTS:
        of_head = any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, list))
        return _HEAD if of_head else _LAYERS
    return _REST


def shares(events: Iterable[FunctionEvent], vocabulary: int) -> tuple[dict[str, float], float]:
    """Return the seconds of each kind, and the rate of the layers' products in FLOP/s."""
    times: Counter[str] = Counter()
    flops = 0
    for event in events:
        kind = kind_of(event, vocabulary)
        times[kind] += event.self_cpu_time_total
        flops += (event.flops or 0) if kind == _LAYERS else 0
    seconds = {kind: times[kind] / 1e6 for kind in KINDS}
    return seconds, flops / seconds[_LAYERS]


def product_rate(tokens: int, wide: int, narrow: int, least_s: float = 1.0) -> float:
    """Return the rate of the product of an MLP's projection alone, in FLOP/s."""
    hidden, weight = torch.randn(tokens, narrow), torch.randn(wide, narrow)
    for _ in range(3):
        F.linear(hidden, weight)
    number, start = 0, time.perf_counter()
    while time.perf_counter() - start < least_s:
        F.linear(hidden, weight)
        number += 1
    return 2 * tokens * wide * narrow * number / (time.perf_counter() - start)


def profiled(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train, and return what was measured."""
    module = PreferenceModule(
        str(options.model),
        loss=BalancedDPOLoss(),
        optimizer=lambda parameters: MarkedAdamW(parameters, lr=1e-6, weight_decay=0.0),
        scoring=ScoringOptions(cache_dir=str(scratch)),
        compile=options.compile,
    )
    data = PreferenceDataModule(
        str(options.data), batch_size=options.batch_size, max_length=options.max_length, held_out_fraction=0.0
    )
    watch = Profiled()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=options.steps + 1, num_sanity_val_steps=0, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        use_distributed_sampler=False, callbacks=[watch],
    )  # fmt: skip
    trainer.fit(module, data)
    config = module.policy.config
    seconds, rate = shares(watch.events, config.vocab_size)
    alone = product_rate(watch.positions // options.steps, config.intermediate_size, config.hidden_size)
    return {
        "model": Path(options.model).name,
        "data": Path(options.data).name,
        "compile": options.compile,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "steps_s": watch.seconds,
        "seconds": seconds,
        "products_flop_per_s": rate,
        "a_product_alone_flop_per_s": alone,
        "tokens": watch.tokens,
        "positions": watch.positions,
    }


def markdown(row: dict[str, Any]) -> str:
    """Return the result as a table: a line for each kind of work."""
    whole = sum(row["seconds"].values())
    rate, alone = row["products_flop_per_s"] / 1e9, row["a_product_alone_flop_per_s"] / 1e9
    lines = [
        "| work | share of the time |",
        "|---|---|",
        *(f"| {kind} | {seconds / whole:.1%} |" for kind, seconds in row["seconds"].items()),
        "",
        f"{row['steps_s'] / row['steps']:.1f} s a step of {row['batch_size']} pairs. The layers' products run at "
        f"{rate:.0f} GFLOP/s, a product alone at {alone:.0f}: {rate / alone:.0%}. "
        f"Padding: {1 - row['tokens'] / row['positions']:.1%} of the positions.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--data", required=True, help="file of pairs")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens; longer pairs are cut")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps")
    parser.add_argument("--compile", help="backend that compiles the layers, as `fit --model.compile`")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--tag", default="", help="goes into the result's name")
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    told = machine("cpu")
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as scratch:
        row = profiled(options, Path(scratch))
    tag = f"-{options.tag}" if options.tag else ""
    path = write_rows(options.out, f"cpu-profile{tag}", "benchmarks.jobs.profile", started, told, [row])
    print(markdown(row))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
