"""The imbalance of the reference's comprehension of a pair's two responses, and the halves of a set by it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdpo_pl.data.loading import load_pairs
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.embedded.make.data import Row
from bdpo_pl.forward.prefix_sharing import RowLayout, choose_layout
from bdpo_pl.models.loading import ModelSource, load_model, load_tokenizer
from bdpo_pl.scoring.scores import ScoreTable, table_comprehension
from bdpo_pl.scoring.scoring_pass import score_pairs
from benchmarks.study.run.settings import Pairs

# One response of a strongly re-weighted pair has at least this multiple of the other's weight.
STRONG_RATIO = 1.5
TAUS = (0.25, 1.0)
_WINDOW = 512


def imbalances(file: Path, source: Path) -> np.ndarray:
    """Compute c_w − c_l, (M,), of the pairs of `file` by `pmi` under the reference at `source`, in nats per token."""
    table, scores = score_file(file, source, RowLayout.SPLIT)
    chosen, rejected = table_comprehension(scores, table, "pmi").double().numpy()
    return np.asarray(chosen - rejected)


def score_file(file: Path, source: Path, layout: RowLayout | None = None) -> tuple[PairTable, ScoreTable]:
    """Read the pairs of `file`, and score them in float32 with the model at `source`, against the null prompt too.

    Args:
        file: file of pairs; those that are longer than the window are left out.
        source: folder of the model.
        layout: layout of a pair in rows; None: the most efficient one in which the model is exact.
    """
    model, tokenizer = ModelSource(str(source)), load_tokenizer(ModelSource(str(source)))
    table, _ = load_pairs("train", str(file), PairTokenizer(tokenizer), Truncation(_WINDOW, "drop"))
    policy, pad_id = load_model(model, torch.float32).eval(), tokenizer.pad_token_id
    layout = layout or choose_layout(policy, table, pad_id=pad_id)
    return table, score_pairs(policy, table, np.arange(len(table)), layout=layout, pad_id=pad_id)


def choose(rows: Sequence[Row], imbalance: np.ndarray, which: Pairs, seed: int) -> list[Row]:
    """Choose the half of `rows` by |imbalance|, half of each kind of prompt, in the order of `rows`.

    Kinds are halved separately; otherwise the halves would also differ in their share of harmful prompts.
    """
    rng = random.Random(f"half {seed}")  # noqa: S311 - data, not secrets
    kept: set[int] = set()
    for kind in sorted({row["kind"] for row in rows}):
        mine = [i for i, row in enumerate(rows) if row["kind"] == kind]
        if which == "random half":
            rng.shuffle(mine)
        else:
            mine.sort(key=lambda i: abs(imbalance[i]), reverse=which == "imbalanced half")
        kept.update(mine[: len(mine) // 2])
    return [row for i, row in enumerate(rows) if i in kept]


def describe(comprehension: Tensor) -> dict[str, float]:
    """Describe the distribution of c_w − c_l over the pairs.

    Args:
        comprehension: (2, M) comprehension, chosen first, in the estimator's unit.
    """
    difference = (comprehension[0] - comprehension[1]).double()
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    found = {
        f"q{level * 100:.0f}": q for level, q in zip(levels.tolist(), difference.quantile(levels).tolist(), strict=True)
    }
    found |= {
        "mean": difference.mean().item(),
        "std": difference.std().item(),
        "mean_abs": difference.abs().mean().item(),
        "chosen_better": (difference > 0).double().mean().item(),
    }
    for tau in TAUS:
        # An imbalance of τ·ln r gives weights whose ratio is r.
        strong = difference.abs() >= tau * np.log(STRONG_RATIO)
        found[f"strong_at_tau_{tau:g}"] = strong.double().mean().item()
    return found
