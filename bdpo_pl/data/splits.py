"""Splits of preference pairs: training, held out, and a probe of training pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bdpo_pl.data.consistency import first_of_prompt
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import padding_id
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError


@dataclass(frozen=True)
class PreferenceSplits:
    """Tokenised pairs of all splits of a job, and how they were read.

    Attributes:
        tables: pairs, by the name of their split (`train`, `held_out`, `held_out/NAME`, `train_probe`).
        tokenizer: tokenizer of the pairs.
        truncation: treatment of pairs that are longer than the window.
        chat_template: name of the chat template (`auto`, `none` or a file).
        probe_indices: indices in `train` of the pairs of `train_probe`; None without a probe.
        monitored: name of the set in `held_out`, the first of several; "" if it has none.
    """

    tables: dict[str, PairTable]
    tokenizer: TokenizerLike
    truncation: Truncation
    chat_template: str
    probe_indices: np.ndarray | None = None
    monitored: str = ""

    @property
    def scored(self) -> list[str]:
        """Splits with pairs of their own: all but the probe, whose pairs are training pairs."""
        return [name for name in self.tables if name != "train_probe"]

    @property
    def validation(self) -> list[str]:
        """Splits that are evaluated at validations, in order."""
        return [name for name in self.tables if name != "train"]

    @property
    def held_out_pairs(self) -> dict[str, int]:
        """Numbers of pairs in the held-out sets by their name, the monitored one first; its name may be ""."""
        sizes = {name: len(table) for name, table in self.tables.items() if name.startswith("held_out")}
        return {name.partition("/")[2] or self.monitored: size for name, size in sizes.items()}

    @property
    def pad_id(self) -> int:
        """Token id that fills padding, which the model does not see; any id will do."""
        return padding_id(self.tokenizer)


def split_by_prompt(table: PairTable, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of (rest, held out): about `fraction` of the pairs, by `seed`, no prompt on both sides.

    Raises:
        InputError: there are fewer than two different prompts.
    """
    groups: dict[int, list[int]] = {}
    for i, first in enumerate(first_of_prompt(table)):
        groups.setdefault(first, []).append(i)
    if len(groups) < 2:
        raise InputError(
            "data.held_out_fraction: cannot hold out pairs of a set with a single prompt; give data.held_out, or set "
            "data.held_out_fraction to 0"
        )
    order = list(groups)
    target = max(1, round(fraction * len(table)))
    held: list[int] = []
    for g in np.random.default_rng(seed).permutation(len(order))[:-1]:
        if len(held) >= target:
            break
        held.extend(groups[order[int(g)]])
    is_held = np.zeros(len(table), dtype=bool)
    is_held[held] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
