"""Imbalance of real pairs: `python -m benchmarks.study.real.imbalance --model NAME=FOLDER --data FOLDER`.

For every model, set of pairs and estimator of comprehension, `diagnose` is run as a user runs it, and its numbers are
kept. `hh` is a draw of HH-RLHF's pairs; `refusals` has PyRIT's prompts that have an answer labelled refusal and one
labelled compliance, the refusal chosen. `--model` can be given several times. No text of the data is printed or kept.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdpo_pl.comprehension import ESTIMATORS
from bdpo_pl.statistics import spearman
from benchmarks.machine import machine
from benchmarks.study.real.cell import draw, run_command
from benchmarks.written import write_rows

RESULTS = Path(__file__).parents[2] / "results"
LABELLED = "judges/pyrit_refusal_labels.jsonl.gz"
NUMBER = 200
KEPT = ("chosen", "rejected", "imbalance", "size", "spread", "strong")
"""Fields of `Group` that are kept, of all pairs and of each category."""


def hh(data: Path, number: int = NUMBER) -> list[dict[str, str]]:
    """Return pairs of HH-RLHF from which training pairs of the study are drawn, with both dialogues as texts."""
    return [json.loads(line) for line in draw(data, "train", number)]


def refusals(data: Path) -> list[dict[str, str]]:
    """Return pairs of labelled answers to one prompt: the first refusal is chosen, the first compliance rejected."""
    answers: dict[str, dict[str, dict[str, str]]] = {}
    with gzip.open(data / LABELLED, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            answers.setdefault(row["prompt"], {}).setdefault(row["label"], row)
    return [
        {
            "prompt": prompt,
            "chosen": by_label["refusal"]["response"],
            "rejected": by_label["compliance"]["response"],
            "category": by_label["compliance"]["case"],
        }
        for prompt, by_label in answers.items()
        if {"refusal", "compliance"} <= by_label.keys()
    ]


def measure(
    model: Path, rows: Sequence[Mapping[str, str]], estimator: str, cache: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """Diagnose pairs with a model.

    Args:
        model: folder of the model.
        rows: pairs.
        estimator: estimator of comprehension.
        cache: folder of cached scores, which estimators share where they need the same.

    Returns:
        What is kept of the diagnosis; and the imbalance of each pair in the order of `rows`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        run_command(
            "diagnose", f"--model.policy={model}", f"--data.train={pairs}", "--data.held_out_fraction=0",
            "--data.max_length=512", f"--diagnose.folder={scratch}/diagnosis",
            f"--model.scoring.cache_dir={cache}", "--model.loss=bdpo_pl.losses.BalancedDPOLoss",
            f"--model.loss.init_args.estimator={estimator}", "--trainer.accelerator=cpu",
        )  # fmt: skip
        found = json.loads((Path(scratch) / "diagnosis" / "diagnosis.json").read_text(encoding="utf-8"))
        with (Path(scratch) / "diagnosis" / "pairs.jsonl").open(encoding="utf-8") as lines:
            imbalance = np.array([json.loads(line)["imbalance"] for line in lines])
    split = found["splits"]["train"]
    kept = {
        "pairs": split["overall"]["pairs"],
        "unit": found["unit"],
        "tau": found["suggested_tau"],
        **{name: split["overall"][name] for name in KEPT},
        "weight_ratio": split["weight_ratio"],
        "temperatures": found["temperatures"],
        "length_bias": split["length_bias"],
        "categories": [
            {name: group[name] for name in ("name", "pairs", *KEPT)} for group in split["categories"] if group["name"]
        ],
        "template": found["facts"]["chat template"],
    }
    return kept, imbalance


def agreement(imbalances: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Compare the estimators two by two.

    Args:
        imbalances: (M,) imbalance of each pair by estimator.

    Returns:
        `estimators`; `spearman`: their correlation; `same_sign`: share of pairs whose better comprehended response is
        the same one for both.
    """
    return [
        {
            "estimators": [first, second],
            "spearman": spearman(imbalances[first], imbalances[second]),
            "same_sign": float(np.mean(np.sign(imbalances[first]) == np.sign(imbalances[second]))),
        }
        for first, second in itertools.combinations(imbalances, 2)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", required=True, metavar="NAME=FOLDER", help="name and folder of a model"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the published pairs and labelled answers")
    parser.add_argument("--folder", type=Path, default=Path("runs/imbalance"), help="folder of cached scores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--pairs", type=int, default=NUMBER, help="number of pairs of HH-RLHF")
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    sets = {"hh": hh(options.data, options.pairs), "refusals": refusals(options.data)}
    rows: list[dict[str, Any]] = []
    for name, _, folder in (model.partition("=") for model in options.model):
        for pairs, texts in sets.items():
            imbalances = {}
            for estimator in ESTIMATORS:
                start = time.perf_counter()
                found, imbalances[estimator] = measure(Path(folder), texts, estimator, options.folder.resolve())
                seconds = time.perf_counter() - start
                rows.append({"model": name, "set": pairs, "estimator": estimator, **found, "seconds": seconds})
                print(f"{name}, {pairs}, {estimator}: spread {found['spread']:.3g}, {seconds:.0f} s", flush=True)
            rows.append({"model": name, "set": pairs, "agreement": agreement(imbalances)})
    print(write_rows(options.out, "imbalance", "benchmarks.study.real.imbalance", started, machine("cpu"), rows))


if __name__ == "__main__":
    main()
