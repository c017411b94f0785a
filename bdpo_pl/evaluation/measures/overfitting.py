"""Margin and accuracy on training pairs against held-out and out-of-distribution pairs, to detect memorisation.

For each pair, Δ = log π(y|x) − log π₀(y|x), where π is a model and π₀ the first model of the evaluation, usually the
one before alignment. The margin is Δ of the chosen response minus Δ of the rejected one, in nats, without β; a pair is
correct if its margin is above 0. A gap is training − other pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bdpo_pl import embedded
from bdpo_pl.data.loading import LoadOptions, check_used, load_pairs
from bdpo_pl.data.report import DataReport
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.losses.base import TIE
from bdpo_pl.models.causal_lm import CausalLM, ModelConfig
from bdpo_pl.models.loading import num_positions
from bdpo_pl.scoring.scoring_pass import score_pairs
from bdpo_pl.statistics import Interval, gap, independent, mean

_FILES = {
    "train": embedded.TRAIN_FILE,
    "held_out": embedded.HELD_OUT_FILE,
    "out_of_distribution": embedded.OUT_OF_DISTRIBUTION_FILE,
}


@dataclass
class PairsOptions:
    """Preference pairs to measure overfitting.

    Args:
        train: file, folder or hub dataset of pairs that the models were trained on; `embedded` for the set of bdpo_pl.
        held_out: pairs of the same kind that the models were not trained on.
        out_of_distribution: pairs of another kind, such as other categories or framings.
        max_pairs: maximum number of pairs of each set, drawn at random; 0 uses all.
        max_length: window in tokens; longer pairs are left out and counted.
        load: schema, column names and handling of bad rows, as in `data.load` of `fit`.
        seed: seed of the draw.

    Raises:
        InputError: a number is out of range.
    """

    train: str | None = None
    held_out: str | None = None
    out_of_distribution: str | None = None
    max_pairs: int = 240
    max_length: int = 1024
    load: LoadOptions | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_pairs < 0 or self.max_length < 2:
            raise InputError(
                f"pairs.max_pairs must be at least 0 and pairs.max_length at least 2, got {self.max_pairs} and "
                f"{self.max_length}"
            )

    def sources(self) -> dict[str, str]:
        """Split → file or dataset, for the splits that are given."""
        named = {split: getattr(self, split) for split in _FILES}
        return {split: str(_FILES[split]) if s == EMBEDDED else s for split, s in named.items() if s is not None}


@dataclass(frozen=True)
class SplitMargins:
    """Margins of a model on the pairs of a split, against the first model; drifts are Δ, in nats."""

    margin: Interval
    accuracy: Interval
    drift_chosen: float
    drift_rejected: float


@dataclass(frozen=True)
class Overfitting:
    """Margins of a model by split, and its gaps, training − split, with 95 % intervals of independent samples.

    The interval of a gap in accuracy is Newcombe's, because a normal one would have length 0 if all pairs are right.
    """

    splits: dict[str, SplitMargins]
    margin_gaps: dict[str, Interval]
    accuracy_gaps: dict[str, Interval]


class PairProbe:
    """Preference pairs, tokenised once with the first model's tokenizer.

    Args:
        options: choice of the pairs.
        tokenizer: tokenizer of the first model.
        config: configuration of the first model, for its window.
    """

    def __init__(self, options: PairsOptions, tokenizer: TokenizerLike, config: ModelConfig) -> None:
        self.vocabulary = tokenizer.get_vocab()
        self.template = tokenizer.chat_template
        pairs = PairTokenizer(tokenizer)
        window = min(options.max_length, num_positions(config) or options.max_length)
        self.tables: dict[str, PairTable] = {}
        self.reports: list[DataReport] = []
        rng = np.random.default_rng(options.seed)
        for split, source in options.sources().items():
            place = "train" if split == "train" else "test"
            table, report = load_pairs(split, source, pairs, Truncation(window), options.load, place, alone=False)
            if options.max_pairs and len(table) > options.max_pairs:
                report.note("not drawn (pairs.max_pairs)", len(table) - options.max_pairs)
                table = table.select(np.sort(rng.choice(len(table), options.max_pairs, replace=False)))
                report.describe(table)
            self.tables[split] = table
            self.reports.append(report)
        check_used(options.load or LoadOptions(), self.reports)

    def check_reads_alike(self, tokenizer: TokenizerLike, label: str) -> None:
        """Raise `InputError` if `label` tokenises these pairs differently, which would make log-ratios meaningless."""
        if tokenizer.get_vocab() != self.vocabulary or tokenizer.chat_template != self.template:
            raise InputError(
                f"pairs: {label} has another tokenizer or chat template than the first model, so their "
                "log-probabilities cannot be compared; evaluate it alone, or leave pairs out"
            )

    def logps(self, model: CausalLM, name: str, pad_id: int) -> dict[str, np.ndarray]:
        """Compute the (2, M) log-probabilities of the chosen and the rejected responses of each split's M pairs."""
        first = next(iter(self.tables.values()))
        layout = choose_layout(model, first, "auto", name=name, pad_id=pad_id)
        return {
            split: score_pairs(
                model, table, range(len(table)), layout=layout, pad_id=pad_id, comprehension=False
            ).reference.astype(np.float64)
            for split, table in self.tables.items()
        }


def overfitting(first: Mapping[str, np.ndarray], logps: Mapping[str, np.ndarray]) -> Overfitting:
    """Compute margins and gaps of a model from its log-probabilities and the first model's, by split."""
    margins = {split: (logps[split] - first[split])[0] - (logps[split] - first[split])[1] for split in logps}
    # As in training, a difference within rounding errors is not a preference.
    right = {split: np.where(np.abs(m) <= TIE, 0.5, m > 0).astype(np.float64) for split, m in margins.items()}
    splits = {
        split: SplitMargins(
            _margin(margins[split]),
            # A model compared with itself ties on every pair, so the value has no sampling error.
            mean(right[split], rate=bool((right[split] != 0.5).any())),
            float((logps[split] - first[split])[0].mean()),
            float((logps[split] - first[split])[1].mean()),
        )
        for split in logps
    }
    others = [split for split in splits if split != "train"] if "train" in splits else []
    return Overfitting(
        splits,
        {split: _margin_gap(margins["train"], margins[split]) for split in others},
        {split: gap(splits["train"].accuracy, splits[split].accuracy) for split in others},
    )


def _margin(margins: np.ndarray) -> Interval:
    """Compute the mean of (M,) margins; a single one has no interval, because it does not tell how much they vary."""
    return mean(margins, rate=False) if len(margins) > 1 else independent(margins, 2)


def _margin_gap(train: np.ndarray, other: np.ndarray) -> Interval:
    """Compute the difference of two independent means, with a normal interval if both are of at least two margins."""
    return gap(independent(train, 2), independent(other, 2))
