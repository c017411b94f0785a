"""A published model and published pairs, written as the input of every trainer.

The pairs become chat messages, which each trainer renders with the model's own template, so all read the same tokens.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bdpo_pl.data.messages import RowError
from bdpo_pl.data.schemas.hh_rlhf import HH_RLHF
from bdpo_pl.data.sources import read_records
from benchmarks.jobs.problem import REAL, DPOProblem


def build_real(problem: DPOProblem, model: Path, pairs: str, folder: Path) -> DPOProblem:
    """Write a random sample of `pairs` that fits the window, and links to the model; return the problem with its size.

    Args:
        problem: settings of the job; `window` is the longest sequence in tokens.
        model: folder of a model in the Hugging Face layout, with its tokenizer and chat template.
        pairs: file of HH-RLHF's dialogues.
        folder: folder to write to.

    Raises:
        SystemExit: there are too few pairs.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    records = list(read_records(pairs))
    random.Random(0).shuffle(records)  # noqa: S311 - a sample, not a secret
    kept: list[dict[str, Any]] = []
    tokens = 0
    for record in records:
        try:
            turns = HH_RLHF.parse(record).turns
        except RowError:
            continue
        assert turns is not None
        sizes = [
            len(tokenizer.apply_chat_template([*turns.prompt, *answer], tokenize=True, return_dict=False))
            for answer in (turns.chosen, turns.rejected)
        ]
        if max(sizes) > problem.window:
            continue
        kept.append({"prompt": turns.prompt, "chosen": turns.chosen, "rejected": turns.rejected})
        tokens += sum(sizes)
        if len(kept) == problem.num_pairs:
            break
    if len(kept) < problem.num_pairs:
        raise SystemExit(f"{pairs} has only {len(kept)} pairs that fit {problem.window} tokens")
    for name in ("model", "tokenizer"):
        (folder / name).symlink_to(model.resolve())
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("", encoding="utf-8")
    problem = replace(problem, model=model.name, mix=REAL, num_tokens=tokens)
    (folder / "problem.json").write_text(json.dumps(asdict(problem)), encoding="utf-8")
    return problem
