"""The frozen reference during a run: scored once before training, kept live, or absent."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning as L
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

import bdpo_kernels
from bdpo_pl.comprehension import Estimator
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError
from bdpo_pl.forward.prefix_sharing import PrefixSharing, choose_layout
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.models.adapters import adapters_off
from bdpo_pl.models.loading import ModelSource, frozen, load_model, model_fingerprint
from bdpo_pl.scoring.cache import ScoreCache, default_cache_dir
from bdpo_pl.scoring.scores import ScoreTable
from bdpo_pl.scoring.scoring_pass import Ranks, ScoringOptions, score_pairs, score_table, table_comprehension

ReferenceMode = Literal["precomputed", "live", "none"]
ReferenceChoice = Literal["auto", ReferenceMode]


@dataclass
class SplitScores:
    """What a loss is given besides the policy's log-probabilities, of M pairs: (2, M) float32 each, chosen first."""

    reference: Tensor | None = None
    comprehension: Tensor | None = None


class AdaptedPolicy(Protocol):
    """A policy whose adapters can be switched off, which makes it its own reference.

    Attributes:
        policy: the model with its adapters.
        row_layout: how it reads pairs.
        quantization: name of the quantisation of its frozen weights, if any.
    """

    policy: Any
    quantization: str | None

    @property
    def row_layout(self) -> RowLayout: ...  # noqa: D102

    def base_model(self) -> nn.Module:
        """The model before it is given adapters: loaded once, and handed on to the policy."""


def choose_mode(choice: ReferenceChoice, loss: PreferenceLoss, given: bool) -> ReferenceMode:
    """The mode that `choice` comes to: with `auto`, no pair is scored for a loss that reads no score.

    Args:
        choice: a mode, or `auto`.
        loss: the loss.
        given: a reference model is named, which asks for its scores.
    """
    if choice != "auto":
        return choice
    return "precomputed" if loss.needs_reference or loss.needs_comprehension or given else "none"


class Reference:
    """Scores of the frozen reference model for the pairs of each split.

    Args:
        source: the reference model.
        mode: `precomputed`: score every pair once, before the policy is loaded, and cache it; `live`: keep the model
            in memory and score each batch; `none`: no reference, for losses that need none.
        dtype: of its weights; the policy's own gives a log-ratio of exactly zero at the start.
        options: of the scoring pass.
        prefix_sharing: whether a prompt is read once for all that follows it; see `choose_layout`.
        adapted: the policy, where the reference is that without its adapters: no second model is loaded.

    Raises:
        InputError: an unknown mode.
    """

    def __init__(
        self,
        source: ModelSource,
        mode: ReferenceMode,
        dtype: torch.dtype,
        options: ScoringOptions,
        prefix_sharing: PrefixSharing = "auto",
        adapted: AdaptedPolicy | None = None,
    ) -> None:
        self.source = source
        self.mode = mode
        self.dtype = dtype
        self.options = options
        self.prefix_sharing: PrefixSharing = prefix_sharing
        self._scores: dict[str, SplitScores] = {}
        self._model: nn.Module | None = None
        self.layout: RowLayout | None = None
        """How the model reads pairs; None as long as it has read none."""
        self.attention: str | None = None
        self._adapted = adapted

    def check_fits(self, loss: PreferenceLoss) -> None:
        """Raise `InputError` if `loss` reads what this reference does not give."""
        name = type(loss).__name__
        if self.mode == "none" and (loss.needs_reference or loss.needs_comprehension):
            raise InputError(
                f"{name} needs a reference model, and model.reference_mode is none; set it to precomputed or live"
            )
        if loss.needs_comprehension and not self.options.comprehension:
            raise InputError(
                f"{name} needs comprehension, and model.scoring.comprehension is false; set it to true, "
                "or take a loss that reads none (BalancedDPOLoss: turn the balance off)"
            )

    def check_strategy(self, trainer: L.Trainer) -> None:
        """Raise `InputError` if the policy is split and each rank would have to score with it alone."""
        if self.mode == "live" and self._adapted is not None and isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError(
                "model.reference_mode is live, and the reference is the policy without its adapters, which "
                f"{type(trainer.strategy).__name__} splits over the devices; set it to precomputed"
            )

    def prepare(self, trainer: L.Trainer, data: PreferenceSplits, loss: PreferenceLoss) -> None:
        """Score every split of `data` that is not scored yet (`precomputed`), or load the model to keep (`live`)."""
        if self.mode == "live" and self._model is None and self._adapted is None:
            self._model = self._load(trainer)
            self._choose_layout(self._model, trainer, data)
        if self.mode != "precomputed" or self._scores:
            return
        self._score_splits(trainer, data, loss)
        if data.probe_indices is not None:
            train, probe = self._scores["train"], torch.from_numpy(data.probe_indices)
            self._scores["train_probe"] = SplitScores(_take(train.reference, probe), _take(train.comprehension, probe))
        # By now nothing holds on to the model: training has its memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _score_splits(self, trainer: L.Trainer, data: PreferenceSplits, loss: PreferenceLoss) -> None:
        load = cache(lambda: self._load(trainer))
        layout = cache(lambda: self._choose_layout(load(), trainer, data))
        for split in ("train", "held_out"):
            if split in data.tables:
                scores = self._score(split, load, layout, trainer, data, loss)
                self._scores[split] = _split_scores(scores, data.tables[split], loss.estimator)

    def scores(self, split: str, pair_index: Tensor, data: PreferenceSplits, loss: PreferenceLoss) -> SplitScores:
        """Scores of the B pairs at `pair_index` of `split`, on its device."""
        device = pair_index.device
        if self.mode == "none":
            return SplitScores()
        if self.mode == "live":
            table, indices = data.tables[split], pair_index.cpu().numpy()
            with self._live() as (model, layout):
                scores = score_pairs(model, table, indices, layout=layout, **self._options(data, loss))
            found = _split_scores(scores, table.select(indices), loss.estimator)
            return SplitScores(*(None if t is None else t.to(device) for t in (found.reference, found.comprehension)))
        held = self._scores[split]
        if held.reference is not None and held.reference.device != device:
            held = SplitScores(*(None if t is None else t.to(device) for t in (held.reference, held.comprehension)))
            self._scores[split] = held
        return SplitScores(_take(held.reference, pair_index), _take(held.comprehension, pair_index))

    @contextmanager
    def _live(self) -> Iterator[tuple[nn.Module, RowLayout]]:
        """The model in memory: the reference, or the policy without its adapters."""
        if self._adapted is None:
            assert self._model is not None
            assert self.layout is not None
            yield self._model, self.layout
        else:
            with adapters_off(self._adapted.policy) as model:
                yield model, self._adapted.row_layout

    def _load(self, trainer: L.Trainer) -> nn.Module:
        model = load_model(self.source, self.dtype) if self._adapted is None else self._adapted.base_model()
        return frozen(model, trainer.strategy.root_device)

    def _choose_layout(self, model: Any, trainer: L.Trainer, data: PreferenceSplits) -> RowLayout:
        self.layout = choose_layout(
            model,
            data.tables["train"],
            self.prefix_sharing,
            name=self.source.name,
            attention=self.source.attn_implementation,
            pad_id=data.pad_id,
            context=trainer.precision_plugin.forward_context,
        )
        self.attention = model.config._attn_implementation
        return self.layout

    def _options(self, data: PreferenceSplits, loss: PreferenceLoss) -> dict[str, Any]:
        return {
            "batch_tokens": self.options.batch_tokens,
            "pad_id": data.pad_id,
            "comprehension": self.options.comprehension,
            "hsic": self.options.comprehension and loss.estimator == "hsic",
        }

    def _score(
        self, split: str, load: Any, layout: Any, trainer: L.Trainer, data: PreferenceSplits, loss: PreferenceLoss
    ) -> ScoreTable:
        table = data.tables[split]
        hsic = self.options.comprehension and loss.estimator == "hsic"
        key = {
            "format": 2,
            # Token ids, boundaries and null prompt: what template, truncation and tokenizer come to.
            "pairs": table.content_digest(),
            "template": data.chat_template,
            "truncation": repr(data.truncation),
            "model": model_fingerprint(self.source),
            "revision": self.source.revision,
            "dtype": str(self.dtype),
            "precision": trainer.precision,
            "attention": self.source.attn_implementation,
            "quantization": None if self._adapted is None else self._adapted.quantization,
            "prefix_sharing": self.prefix_sharing,
            "device": trainer.strategy.root_device.type,
            "kernels": bdpo_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "comprehension": self.options.comprehension,
            "hsic": hsic,
        }
        root = Path(self.options.cache_dir).expanduser() if self.options.cache_dir else default_cache_dir()
        return score_table(
            split,
            table,
            load,
            ScoreCache(root, key, len(table), self.options.chunk_pairs),
            self.options,
            layout=layout,
            pad_id=data.pad_id,
            hsic=hsic,
            context=trainer.precision_plugin.forward_context,
            ranks=Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.barrier),
        )


def _split_scores(scores: ScoreTable, table: PairTable, estimator: Estimator) -> SplitScores:
    measured = None if scores.null is None else table_comprehension(scores, table, estimator)
    return SplitScores(torch.from_numpy(scores.reference), measured)


def _take(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values.index_select(1, index)
