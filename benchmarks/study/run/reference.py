"""Train the study's reference from scratch: `python -m benchmarks.study.reference [--world 0] [--folder FOLDER]`.

It takes one core and a few minutes; the same seed, machine and versions give the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import time
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from bdpo_pl.embedded.make.model import new_model, train, train_tokenizer
from bdpo_pl.models.loading import ModelSource, load_tokenizer
from benchmarks.study.world import texts as world

DEFAULT_FOLDER = Path(__file__).parents[1] / "cache"
# Maximum: the world's texts give about 2,100.
VOCABULARY = 4096
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS = 1600
BATCH_SIZE = 48
# Number of examples that distinguish one world from another.
_DIGESTED = 2000


def reference_folder(folder: Path, number: int, steps: int) -> Path:
    """Return the folder of the reference of world `number`; another world or model has another folder."""
    return folder / f"reference-{number}-{steps}-{_digest(number)}"


@cache
def _digest(number: int) -> str:
    taught = list(itertools.islice(world.conversations(number, 2 * number + 1), _DIGESTED))
    return hashlib.sha256(json.dumps([taught, SIZES, VOCABULARY, BATCH_SIZE]).encode()).hexdigest()[:8]


def make_reference(folder: Path, number: int = 0, steps: int = STEPS) -> Path:
    """Return the folder of the reference of world `number`, which is trained if it does not exist.

    Args:
        folder: folder of all references.
        number: seed of the weights, of the order of examples and of what is frequent.
        steps: number of steps of supervised training.
    """
    target = reference_folder(folder, number, steps)
    if target.exists():
        return target
    torch.set_num_threads(1)
    torch.manual_seed(number)
    # Complete or not at all: an interrupted run leaves no partial reference.
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = train_tokenizer(world.conversations(number, 2 * number), VOCABULARY)
    tokenizer.save_pretrained(partial)
    model = new_model(tokenizer, **SIZES)
    model.config.save_pretrained(partial)
    # Read back, as every later user of the folder does: transformers splits a Qwen2's texts in its own way.
    tokenizer = load_tokenizer(ModelSource(str(partial)))
    train(model, tokenizer, world.conversations(number, 2 * number + 1), steps, BATCH_SIZE)
    model.save_pretrained(partial)
    partial.rename(target)
    return target


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args()
    start = time.perf_counter()
    Console().print(make_reference(options.folder, options.world, options.steps))
    Console().print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
