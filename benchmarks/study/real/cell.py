"""One cell of the study with a real model: `fit` and `evaluate`, as a user runs them, and what they measured."""

from __future__ import annotations

import csv
import gzip
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.real.halves import balance, cached_pool, draw_half, match
from benchmarks.study.real.plan import Cell, HalfCell
from benchmarks.study.run.measures import pair_measures

SUITES = {"xstest_benign": "xstest_prompts", "xstest_harmful": "xstest_prompts", "strongreject": "strongreject_dataset"}
PAIRS = "preferences/hh_rlhf_harmless_test.jsonl.gz"
HELD_OUT = 200
MAX_NEW_TOKENS = 48
_LONGEST = 1_000
"""Characters of a row of the file; longer dialogues are left out, as they take most of the time."""
_SHUFFLE = 20_260_601


@dataclass(frozen=True)
class Place:
    """Where a study finds and puts its files.

    Attributes:
        model: folder of the model that is aligned.
        data: folder with `preferences` and `suites`.
        folder: folder for cached scores.
    """

    model: Path
    data: Path
    folder: Path


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Run one cell.

    Returns:
        `key`; `cell`; `pairs`: measures of held-out and training pairs at the end (log-probabilities and drifts in
        nats, `margin` the difference of the drifts, `gap` that between training and held-out pairs); `suites`: share of
        prompts refused, by suite; `refused`: the same prompt by prompt, a text of 0 and 1; `oddities`: numbers of
        blank, cut-off and repeating answers; `halves`: how alike the two halves are; `seconds`. Only final cells and
        the reference have suites; the reference has no pairs.

    Raises:
        CalledProcessError: a command failed; what it said is on stderr.
    """
    start = time.perf_counter()
    record: dict[str, Any] = {"key": cell.key, "cell": asdict(cell)}
    with tempfile.TemporaryDirectory(dir=place.folder) as scratch:
        subject = place.model
        if cell.loss:
            rows, described = _training_rows(cell, place)
            record |= {"pairs": _fit(cell, place, Path(scratch), rows), **described}
            subject = Path(scratch) / "run" / "model"
        if cell.asks_prompts:
            record |= _evaluate(subject, place, Path(scratch))
    return record | {"seconds": time.perf_counter() - start}


def draw(data: Path, which: str, number: int, seed: int = 0) -> list[str]:
    """Draw lines of the file of pairs.

    Args:
        data: folder of the data.
        which: `test`, `validation` or `train`; no row is in two of them.
        number: number of rows.
        seed: seed of the draw from `train`; the others are always the same.
    """
    rows = _rows(data)
    if which != "train":
        first = {"test": 0, "validation": HELD_OUT}[which]
        return rows[first : first + number]
    return random.Random(seed).sample(rows[2 * HELD_OUT :], number)  # noqa: S311


def _rows(data: Path) -> list[str]:
    """Return the rows of the file that are short enough, shuffled: test, validation and then training pairs."""
    with gzip.open(data / PAIRS, "rt", encoding="utf-8") as lines:
        rows = [line for line in lines if len(line) < _LONGEST]
    random.Random(_SHUFFLE).shuffle(rows)  # noqa: S311 - data, not secrets
    return rows


def _training_rows(cell: Cell, place: Place) -> tuple[list[str], dict[str, Any]]:
    """Return the rows to train on, and what is kept of how they were chosen."""
    if not isinstance(cell, HalfCell):
        return draw(place.data, "train", cell.num_pairs, cell.seed), {}
    rows = _rows(place.data)[2 * HELD_OUT :]
    pool = cached_pool(rows, place.model, place.folder)
    matched = match(pool)
    drawn = draw_half(rows, pool, matched, cell.half, cell.num_pairs, cell.seed)
    return drawn, {"halves": balance(pool, matched)}


def _fit(cell: Cell, place: Place, scratch: Path, rows: list[str]) -> dict[str, float]:
    for name, lines in (("train", rows), ("held_out", draw(place.data, cell.held_out, HELD_OUT))):
        (scratch / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    arguments = [
        f"--model.loss.init_args.{name}={json.dumps(value).strip(chr(34))}" for name, value in cell.arguments.items()
    ]
    run_command(
        "fit", f"--model.policy={place.model}", f"--data.train={scratch / 'train.jsonl'}",
        f"--data.held_out={scratch / 'held_out.jsonl'}", "--data.max_length=512",
        f"--data.batch_size={cell.batch_size}", "--trainer.val_check_interval=1.0", "--trainer.num_sanity_val_steps=0",
        f"--model.loss=bdpo_pl.losses.{cell.loss}", *arguments, "--model.reference_mode=precomputed",
        f"--model.scoring.cache_dir={place.folder / 'scores'}", "--model.optimizer=torch.optim.AdamW",
        f"--model.optimizer.lr={cell.learning_rate}", "--model.optimizer.weight_decay=0", "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu", f"--seed_everything={cell.seed}", "--checkpoint.save_top_k=0",
        f"--trainer.logger.init_args.save_dir={scratch}", "--trainer.logger.init_args.version=run",
    )  # fmt: skip
    with (scratch / "run" / "metrics.csv").open(encoding="utf-8") as file:
        last = [row for row in csv.DictReader(file) if row["held_out/logp_chosen"]][-1]
    shutil.rmtree(scratch / "run" / "checkpoints", ignore_errors=True)
    return pair_measures(last, "logp_accuracy", ("imbalance",))


def _evaluate(subject: Path, place: Place, scratch: Path) -> dict[str, Any]:
    suites = ",".join(f"{name}={place.data / 'suites' / file}.csv.gz" for name, file in SUITES.items())
    run_command(
        "evaluate", f"model={subject}", "--suites", suites, f"--generation.max_new_tokens={MAX_NEW_TOKENS}",
        f"--folder={scratch / 'evaluation'}", f"--export_answers={scratch / 'answers.jsonl'}",
    )  # fmt: skip
    written = json.loads((scratch / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    (model,) = written["models"]
    with (scratch / "answers.jsonl").open(encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    return {
        "suites": {suite["suite"]: suite["overall"]["refused"]["value"] for suite in model["suites"]},
        "refused": {
            name: "".join(str(int(answer["refused"])) for answer in answers if answer["suite"] == name)
            for name in SUITES
        },
        "oddities": model["oddities"],
    }


def run_command(command: str, *options: str) -> None:
    """Run one of the project's commands in a process of its own.

    Raises:
        CalledProcessError: it failed; the end of what it said is on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"bdpo_pl.{command}", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(done.stderr[-3_000:])
        done.check_returncode()
