"""Results of the diagnosis of a model and a preference set, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bdpo_pl.data.consistency import Match, contradictions, first_of_prompt, leaks, near_leaks, repeats
from bdpo_pl.data.held_out import HELD_OUT
from bdpo_pl.data.report import DUPLICATE, DUPLICATE_IN_SOURCES, DataReport
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.diagnosis.measures import (
    Group,
    LengthBias,
    Measured,
    Temperature,
    by_category,
    by_length,
    extremes,
    group,
    length_bias,
)
from bdpo_pl.statistics import finite

TEXTS_WARNING = (
    "This file holds prompts and responses of the data, which may be harmful or private. "
    "Do not pass it on without need; without --diagnose.show_texts the texts are left out."
)


@dataclass(frozen=True)
class PairLine:
    """One pair, by its place; with its texts only if they were requested."""

    place: str
    category: str
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    comprehension_chosen: float
    comprehension_rejected: float
    imbalance: float
    weight_chosen: float
    weight_rejected: float
    scale: float
    strong: bool
    texts: dict[str, str] | None = None


@dataclass(frozen=True)
class Places:
    """A pair and the one that it repeats or contradicts, both by place."""

    place: str
    other: str


@dataclass(frozen=True)
class SplitDiagnosis:
    """Results of one split; its numbers are those of `Group` and `LengthBias`.

    Attributes:
        highest: pairs with the largest comprehension of the chosen minus the rejected response.
        lowest: pairs with the smallest such difference.
        weight_ratio: median, 95th percentile and maximum of the larger weight over the smaller.
        duplicates: places of pairs that repeat an earlier pair token for token.
        duplicates_dropped: true if these were left out on loading.
        swapped: pairs that another pair contradicts with exchanged sides.
        conflicting: pairs with a response that another pair of the same prompt has on the other side.
        repeated_prompts: number of pairs whose prompt also occurs in an earlier pair.
        repeated_chosen: number of pairs whose chosen response is also the chosen one of an earlier pair.
        repeated_rejected: number of pairs whose rejected response is also the rejected one of an earlier pair.
    """

    overall: Group
    categories: list[Group]
    lengths: list[Group]
    length_bias: LengthBias
    highest: list[PairLine]
    lowest: list[PairLine]
    weight_ratio: dict[str, float]
    duplicates: list[str]
    duplicates_dropped: bool
    swapped: list[Places]
    conflicting: list[Places]
    repeated_prompts: int
    repeated_chosen: int
    repeated_rejected: int


@dataclass(frozen=True)
class Leaks:
    """Content of the held-out pairs that also occurs in the training pairs.

    Attributes:
        prompts: held-out pairs whose prompt is a training prompt.
        near_prompts: held-out pairs whose prompt differs from a training prompt only in case, spacing and punctuation.
        chosen: number of held-out pairs whose chosen response is also the chosen one of a training pair.
        pairs: number of held-out pairs, the denominator of the share of `chosen`.
    """

    prompts: list[Places]
    near_prompts: list[Places]
    chosen: int
    pairs: int


@dataclass(frozen=True)
class Diagnosis:
    """Complete results of a diagnosis.

    Attributes:
        facts: description of what was measured and how, by name.
        unit: unit of comprehension, "" if it has none.
        strong_ratio: ratio of the weights at which a pair is strongly re-weighted, as in `Measured`.
        strong_imbalance: imbalance from which a pair is strongly re-weighted; None if this depends on other values too.
        weights_of: source of the balance weights, if they are not those of the loss used in training.
        notes: facts about how the data was read that the reader must know.
        splits: results of each split by its name, `train` first.
        leaks: held-out content found in the training pairs; None if nothing is held out.
        loading: counts of what loading kept and dropped.
        shows_texts: true if texts of the data are included.
        tau: temperature τ of the loss; None if it has none.
        suggested_tau: spread of the training pairs' imbalance, rounded.
        temperatures: effects of several values of τ on the training pairs.
        max_weight_ratio: the loss's bound on the ratio of a pair's weights; None if it has none.
        estimator: estimator of comprehension, by name.
    """

    facts: dict[str, str]
    unit: str
    strong_ratio: float
    strong_imbalance: float | None
    weights_of: str | None
    splits: dict[str, SplitDiagnosis]
    leaks: Leaks | None
    loading: list[DataReport]
    notes: list[str] = field(default_factory=list)
    shows_texts: bool = False
    tau: float | None = None
    suggested_tau: float | None = None
    temperatures: list[Temperature] = field(default_factory=list)
    max_weight_ratio: float | None = None
    estimator: str = "pmi"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, null where a number is not available; texts and their warning only if requested."""
        warning = {"warning": TEXTS_WARNING} if self.shows_texts else {}
        return finite({"format": 2, **warning, **asdict(self)})


def pair_lines(
    measured: Measured, indices: Sequence[int] | np.ndarray, tokenizer: TokenizerLike | None = None
) -> Iterator[PairLine]:
    """Yield the pairs at `indices`; with a `tokenizer`, including their texts."""
    table = measured.table
    for i in map(int, indices):
        texts = None
        if tokenizer is not None:
            pair = table[i]
            ids = {"prompt": pair.prompt_ids, "chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
            texts = {name: tokenizer.decode(tokens) for name, tokens in ids.items()}
        yield PairLine(
            table.places[i],
            table.categories[i],
            int(table.prompt_lengths[i]),
            int(table.trained_lengths[0, i]),
            int(table.trained_lengths[1, i]),
            float(measured.comprehension[0, i]),
            float(measured.comprehension[1, i]),
            float(measured.imbalance[i]),
            float(measured.weights[0, i]),
            float(measured.weights[1, i]),
            float(measured.scale[i]),
            bool(measured.strong[i]),
            texts,
        )


def diagnose_split(
    name: str,
    measured: Measured,
    reports: Sequence[DataReport],
    num_extremes: int,
    tokenizer: TokenizerLike | None = None,
) -> SplitDiagnosis:
    """Diagnose one split.

    Args:
        name: name of the split.
        measured: measurements of its pairs.
        reports: report of the loading of each of its sources, which counts the duplicates that were left out.
        num_extremes: number of pairs listed at each end of the imbalance.
        tokenizer: tokenizer that decodes the texts of listed pairs; None hides the texts.
    """
    table = measured.table
    chosen, rejected = table.response_digests()
    found = contradictions(table)
    high, low = extremes(measured, num_extremes)
    dropped = [
        place
        for report in reports
        for reason in (DUPLICATE, DUPLICATE_IN_SOURCES)
        for place in report.dropped.get(reason, [])
    ]
    kept = [table.places[match.at] for match in repeats(table.pair_digests())]
    return SplitDiagnosis(
        overall=group(measured, name),
        categories=by_category(measured),
        lengths=by_length(measured),
        length_bias=length_bias(measured),
        highest=list(pair_lines(measured, high, tokenizer)),
        lowest=list(pair_lines(measured, low, tokenizer)),
        weight_ratio={
            "median": float(np.median(measured.ratio)),
            "p95": float(np.quantile(measured.ratio, 0.95)),
            "max": float(measured.ratio.max()),
        },
        duplicates=dropped or kept,
        duplicates_dropped=bool(dropped),
        swapped=_places(found.swapped, table, table),
        conflicting=_places(found.conflicting, table, table),
        repeated_prompts=sum(first != i for i, first in enumerate(first_of_prompt(table))),
        repeated_chosen=len(repeats(chosen)),
        repeated_rejected=len(repeats(rejected)),
    )


def find_leaks(tables: Mapping[str, PairTable], tokenizer: TokenizerLike) -> Leaks | None:
    """Find the content of the held-out sets that also occurs in `train`; None if nothing is held out."""
    sets = [table for name, table in tables.items() if name.startswith(HELD_OUT)]
    if not sets:
        return None
    train = tables["train"]
    found = Leaks([], [], 0, sum(map(len, sets)))
    prompts, chosen = _prompts(train, tokenizer), set(train.response_digests()[0])
    for held_out in sets:
        exact = leaks(train, held_out)
        known = {match.at for match in exact}
        near = near_leaks(prompts, _prompts(held_out, tokenizer))
        found = Leaks(
            found.prompts + _places(exact, held_out, train),
            found.near_prompts + _places([match for match in near if match.at not in known], held_out, train),
            found.chosen + sum(digest in chosen for digest in held_out.response_digests()[0]),
            found.pairs,
        )
    return found


def _prompts(table: PairTable, tokenizer: TokenizerLike) -> list[str]:
    ends = table.starts[:-1] + table.prompt_lengths
    ids = [table.tokens[a:b].tolist() for a, b in zip(table.starts[:-1], ends, strict=True)]
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))


def _places(matches: Sequence[Match], table: PairTable, others: PairTable) -> list[Places]:
    return [Places(table.places[match.at], others.places[match.other]) for match in matches]
