"""Observation (b) on real pairs: a balanced and an imbalanced half, alike in length and difficulty.

Imbalance is measured by `pmi` under the model before training. The third of the pairs with the least |imbalance| is
matched one to one with the third with the most, so that the two halves differ in imbalance and in little else.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from scipy.optimize import linear_sum_assignment

from bdpo_pl.files import write_whole
from bdpo_pl.models.loading import ModelSource, model_fingerprint
from bdpo_pl.scoring.scores import table_comprehension
from benchmarks.study.run.imbalance import score_file

CALIPER = 0.5
"""Most that two matched pairs may differ in a covariate, in its standard deviations."""

_FAR = 1e6


@dataclass(frozen=True)
class Pool:
    """What is known of the pairs that the halves are made of, before training. Lists have a value for each pair.

    Attributes:
        row: row of the pool that the pair was read from; rows that are no pairs are left out.
        imbalance: comprehension of the chosen less that of the rejected response, nats per token.
        chosen_tokens: length of the chosen response.
        rejected_tokens: length of the rejected response.
        difficulty: log π_ref a token of the rejected response less that of the chosen one, nats: above 0, the model
            ranks the pair wrong.
    """

    row: list[int]
    imbalance: list[float]
    chosen_tokens: list[int]
    rejected_tokens: list[int]
    difficulty: list[float]

    def covariates(self) -> np.ndarray:
        """Return (M, 3): logarithms of both lengths, and the difficulty, each in its standard deviations."""
        values = np.column_stack([np.log(self.chosen_tokens), np.log(self.rejected_tokens), np.array(self.difficulty)])
        return np.asarray(values / values.std(axis=0).clip(1e-12))


def measure_pool(rows: list[str], model: Path) -> Pool:
    """Measure the pairs in `rows`, lines of the file of pairs, with the model before training."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "pool.jsonl"
        file.write_text("".join(rows), encoding="utf-8")
        table, scores = score_file(file, model)
    chosen, rejected = table_comprehension(scores, table, "pmi").double().numpy()
    lengths = table.trained_lengths
    per_token = scores.reference / lengths
    return Pool(
        # A place ends with the number of its line, from 1.
        row=[int(place.rpartition(" ")[2]) - 1 for place in table.places],
        imbalance=(chosen - rejected).tolist(),
        chosen_tokens=lengths[0].tolist(),
        rejected_tokens=lengths[1].tolist(),
        difficulty=(per_token[1] - per_token[0]).astype(float).tolist(),
    )


def cached_pool(rows: list[str], model: Path, folder: Path) -> Pool:
    """Return the measured pool, from `folder` if a process has measured it; others wait for the one that does.

    The file's name has a digest of the model and the rows, so that those of another study are not read.
    """
    known = model_fingerprint(ModelSource(str(model))) + "".join(rows)
    file = folder / f"pool-{hashlib.sha256(known.encode()).hexdigest()[:16]}.json"
    with FileLock(folder / "pool.lock"):
        if not file.exists():
            write_whole(file, json.dumps(asdict(measure_pool(rows, model))))
        return Pool(**json.loads(file.read_text(encoding="utf-8")))


def match(pool: Pool) -> np.ndarray:
    """Match balanced pairs with imbalanced ones, one to one, with the least sum of squared distances.

    Of the pool's third with the least |imbalance| and its third with the most, two pairs are matched only if no
    covariate differs by more than `CALIPER`.

    Returns:
        (2, K) places in the pool: balanced pairs and their imbalanced partners.
    """
    order = np.argsort(np.abs(pool.imbalance), kind="stable")
    third = len(order) // 3
    balanced, imbalanced = order[:third], order[len(order) - third :]
    covariates = pool.covariates()
    apart = np.abs(covariates[balanced][:, None] - covariates[imbalanced][None])
    cost = np.where((apart > CALIPER).any(axis=2), _FAR, (apart**2).sum(axis=2))
    left, right = linear_sum_assignment(cost)
    near = cost[left, right] < _FAR
    return np.stack([balanced[left[near]], imbalanced[right[near]]])


def balance(pool: Pool, matched: np.ndarray) -> dict[str, float]:
    """Return how alike the halves are: standardised mean differences, imbalanced − balanced; and |imbalance| of both.

    A standardised mean difference under 0.1 is called balanced by most (Austin 2009, 10.1002/sim.3697).
    """
    covariates, size = pool.covariates(), np.abs(pool.imbalance)
    apart = covariates[matched[1]].mean(axis=0) - covariates[matched[0]].mean(axis=0)
    names = ("log chosen tokens", "log rejected tokens", "difficulty")
    return {
        "matched": float(matched.shape[1]),
        **{f"difference/{name}": float(value) for name, value in zip(names, apart, strict=True)},
        "size/balanced": float(size[matched[0]].mean()),
        "size/imbalanced": float(size[matched[1]].mean()),
    }


def draw_half(rows: list[str], pool: Pool, matched: np.ndarray, half: str, number: int, seed: int) -> list[str]:
    """Draw rows of a half; of the same seed, the other half's rows are their partners.

    Args:
        rows: rows of the pool.
        pool: what is known of them.
        matched: result of `match`.
        half: `balanced` or `imbalanced`.
        number: number of rows.
        seed: seed of the draw.

    Raises:
        ValueError: fewer pairs are matched than are to be drawn.
    """
    drawn = random.Random(seed).sample(range(matched.shape[1]), number)  # noqa: S311 - data, not secrets
    places = matched[("balanced", "imbalanced").index(half)][drawn]
    return [rows[pool.row[place]] for place in places]
