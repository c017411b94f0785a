"""The frozen reference of a run: scores computed once before training, a model kept in memory, or no reference."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import bdpo_kernels
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError, first_line
from bdpo_pl.forward.masks import set_attention
from bdpo_pl.forward.prefix_sharing import PrefixSharing, choose_layout
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import (
    ModelSource,
    frozen,
    head_bias,
    hold_products_in,
    load_config,
    load_model,
    model_class,
    model_fingerprint,
)
from bdpo_pl.models.precision import autocast_dtype, half_products
from bdpo_pl.parallel.from_files import mapped_model
from bdpo_pl.parallel.fsdp2 import build_sharded
from bdpo_pl.parallel.state import DATA, TENSOR
from bdpo_pl.reporting.format import size
from bdpo_pl.scoring.cache import ScoreCache, default_cache_dir
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.scores import SplitScores, score_splits, split_scores, table_scores
from bdpo_pl.scoring.scoring_pass import ScoringOptions, passes_needed, score_pairs, score_table, scored_together

ReferenceMode = Literal["precomputed", "live", "none"]
ReferenceChoice = Literal["auto", ReferenceMode]


class AdaptedPolicy(Protocol):
    """A policy with adapters. Its state before training is the reference, so no second model is needed.

    Attributes:
        row_layout: layout in which the policy reads pairs.
        lora: options of the adapters. An adapter that training starts from is part of the reference.
        quantization: name of the quantisation of the frozen weights, if any.
    """

    lora: LoraOptions | None
    quantization: str | None

    @property
    def row_layout(self) -> RowLayout: ...  # noqa: D102

    def base_model(self, dtype: torch.dtype, device: torch.device) -> CausalLM:
        """Load the model in its state before training. It is loaded once, and the policy then trains the same model."""

    def before_training(self) -> AbstractContextManager[Any]:
        """Put the policy back into its state before training, while the context is open."""


def choose_mode(choice: ReferenceChoice, loss: PreferenceLoss, given: bool, moves: bool = False) -> ReferenceMode:
    """Return the mode for `choice`; with `auto`, pairs are scored only if something reads the scores.

    Args:
        choice: mode, or `auto`.
        loss: loss of the run.
        given: true if the user named a reference model, and so wants its scores.
        moves: true if the reference follows the policy, so that scores computed before training become invalid.
    """
    if choice != "auto":
        return choice
    if moves:
        return "live"
    return "precomputed" if loss.needs_reference or loss.needs_comprehension or given else "none"


class Reference:
    """Scores of the frozen reference model for the pairs of each split.

    Args:
        source: reference model.
        mode: `precomputed`: score every pair once, before the policy is loaded, and cache the scores; `live`: keep the
            model in memory and score each batch; `none`: no reference, for losses that need none.
        dtype: dtype of the weights. With the policy's own dtype, the log-ratio is exactly zero at the start.
        options: options of the scoring pass.
        prefix_sharing: choice to read a prompt once for all responses that follow it; see `choose_layout`.
        adapted: policy with adapters whose state before training is the reference, so that no second model is loaded.
        load: function that loads the policy's model before training, if that model is the reference too. It is loaded
            once for both.
    """

    def __init__(
        self,
        source: ModelSource,
        mode: ReferenceMode,
        dtype: torch.dtype,
        options: ScoringOptions,
        prefix_sharing: PrefixSharing = "auto",
        adapted: AdaptedPolicy | None = None,
        load: Callable[[torch.dtype, torch.device], CausalLM] | None = None,
    ) -> None:
        self.source = source
        self.mode = mode
        self.dtype = dtype
        self.options = options
        self.prefix_sharing: PrefixSharing = prefix_sharing
        self._scores: dict[str, SplitScores] = {}
        self._model: CausalLM | None = None
        self.layout: RowLayout | None = None
        """Layout in which the model reads pairs; None until it is chosen."""
        self.attention: str | None = None
        self._adapted = adapted
        self._load_policy = load
        self._machine = Machine()
        self._splits: PreferenceSplits | None = None
        self._loss: PreferenceLoss | None = None
        self._head_bias: bool | None = None

    def check_fits(self, loss: PreferenceLoss) -> None:
        """Raise `InputError` if `loss` reads scores that this reference does not provide."""
        name = type(loss).__name__
        if self.mode == "none" and (loss.needs_reference or loss.needs_comprehension):
            raise InputError(
                f"{name} needs a reference model, and model.reference_mode is none; set it to precomputed or live"
            )
        if loss.needs_comprehension and not self.options.comprehension:
            raise InputError(
                f"{name} needs comprehension, and model.scoring.comprehension is false; set it to true, "
                "or choose a loss that does not read it (BalancedDPOLoss: turn the balance off)"
            )
        if self.mode == "live" and loss.needs_all_pairs:
            raise InputError(
                f"{name} as configured needs the scores of all training pairs before training (tau auto), and with "
                "model.reference_mode live there are none; set it to precomputed, or give model.loss.tau a number"
            )

    def check_machine(self, machine: Machine) -> None:
        """Raise `InputError` if a live reference would need the whole policy on each rank, but the policy is split."""
        if self.mode == "live" and self._adapted is not None and machine.together:
            raise InputError(
                "model.reference_mode is live, and the reference is the policy as it was before training, which this "
                "strategy splits; set it to precomputed"
            )

    def prepare(self, machine: Machine, splits: PreferenceSplits, loss: PreferenceLoss) -> None:
        """Score every split unless that is done already (`precomputed`), or load the model (`live`)."""
        self._machine, self._splits, self._loss = machine, splits, loss
        if self.mode == "live" and self._model is None and self._adapted is None:
            self._model = self._load(machine)
            self._choose_layout(self._model, machine, splits)
        if self.mode != "precomputed" or self._scores:
            return
        load = cache(lambda: self._load(machine))
        layout = cache(lambda: self._choose_layout(load(), machine, splits))

        def score(name: str, table: PairTable) -> SplitScores:
            scores = score_table(
                name,
                table,
                load,
                ScoreCache(self._cache_root(), self._key(table, machine), len(table), self.options.chunk_pairs),
                self.options,
                layout=layout,
                pad_id=splits.pad_id,
                hsic=self._hsic(),
                first=loss.tail_weight is not None,
                machine=machine,
            )
            return split_scores(scores, table, loss.estimator, loss.tail_weight)

        self._scores = score_splits(splits, score)
        loss.prepare(table_scores(splits.tables["train"], self._scores["train"]))
        for name, value in loss.state_dict().items():
            rank_zero_info(f"{type(loss).__name__}: {name} is {value:.4g}, found from the training pairs")
        # Training needs the model's memory: drop the last Python references to it.
        del score
        load.cache_clear()
        layout.cache_clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def scored(self) -> bool:
        """True once the pairs are scored, if the mode is `precomputed`."""
        return bool(self._scores)

    @property
    def model(self) -> CausalLM | None:
        """The live model; None if the mode is not `live`, or if the policy serves as its own reference."""
        return self._model

    def scores(self, split: str, pair_index: Tensor) -> SplitScores:
        """Return the scores of the B pairs at `pair_index` of `split`, on the device of `pair_index`.

        If a live reference is split over the ranks, all of them call this, with any number of pairs above 0.
        """
        device = pair_index.device
        if self.mode == "none":
            return SplitScores()
        if self.mode == "live":
            assert self._splits is not None
            assert self._loss is not None
            table, indices = self._splits.tables[split], pair_index.cpu().numpy()
            with self._live() as (model, layout):
                score = partial(
                    score_pairs,
                    model,
                    table,
                    indices,
                    layout=layout,
                    batch_tokens=self.options.batch_tokens,
                    pad_id=self._splits.pad_id,
                    comprehension=self.options.comprehension,
                    hsic=self._hsic(),
                    first=self._loss.tail_weight is not None,
                )
                if self._machine.together:
                    needed = passes_needed(table, indices, layout, self.options, self._machine)
                    scores = scored_together(lambda least: score(forwards=least), needed, self._machine)
                else:
                    scores = score()
            table = table.select(indices)
            return split_scores(scores, table, self._loss.estimator, self._loss.tail_weight).to(device)
        held = self._scores[split] = self._scores[split].to(device)
        return held[pair_index]

    def layout_of(self, source: ModelSource, dtype: torch.dtype, model: CausalLM) -> RowLayout | None:
        """Return the layout chosen for this reference if `source` and `dtype` of `model` are the same; else None."""
        if self.layout is None or self.source != source or self.dtype != dtype:
            return None
        assert self.attention is not None
        set_attention(model, self.attention)
        return self.layout

    @contextmanager
    def _live(self) -> Iterator[tuple[CausalLM, RowLayout]]:
        """Yield the model in memory and its layout: the reference, or the policy in its state before training."""
        if self._adapted is None:
            assert self._model is not None
            assert self.layout is not None
            yield self._model, self.layout
        else:
            with self._adapted.before_training() as model:
                yield model, self._adapted.row_layout

    def _load(self, machine: Machine) -> CausalLM:
        """Load the model onto the device that scores. If the policy is split, split the model over all devices too."""
        if machine.together:
            # FSDP2 alone, even under tensor parallelism: each rank computes whole layers, as a single device does.
            half = _dtype_of_all(machine)
            mesh = init_device_mesh(machine.device.type, (machine.world_size, 1), mesh_dim_names=(DATA, TENSOR))
            # FSDP2 casts every weight before it multiplies, so the reference can be held in the dtype of its products.
            model = build_sharded(
                self.source,
                half or self.dtype,
                mesh,
                machine.device,
                lora=self._adapter,
                half_products=half,
                cpu_offload=machine.cpu_offload,
            )
            return frozen(model)
        if self._adapted is not None:
            return frozen(self._adapted.base_model(self.dtype, machine.device), machine.device)
        products = autocast_dtype(machine.precision) if self.mode == "precomputed" else None
        alone = self.mode == "precomputed" and machine.world_size == 1
        if self._load_policy is not None and products is None and alone:
            # It is trained next, so it is not frozen.
            return self._load_policy(self.dtype, machine.device).eval().to(machine.device)
        if machine.world_size > 1 and (shared := self._mapped(products)) is not None:
            return frozen(shared, machine.device)
        model = load_model(self.source, self.dtype)
        if products is not None:
            hold_products_in(model, products)
        return frozen(model, machine.device)

    def _mapped(self, products: torch.dtype | None) -> CausalLM | None:
        """Map the model's weights from its files, one copy for all processes of a machine; None if that fails."""
        try:
            found = mapped_model(self.source, self.dtype, products)
        except Exception as error:  # plain loading comes next: it works, or its error says why not
            rank_zero_info(f"Each process holds its own copy of the reference: {first_line(error)}")
            return None
        rank_zero_info(
            f"Reference: {size(found.shared)} are mapped from its files, one copy for all processes of a machine"
            + (
                f"; each process holds {size(found.copied)} more, which the files store in another dtype or in parts"
                if found.copied
                else ""
            )
        )
        return found.model

    @property
    def _adapter(self) -> LoraOptions | None:
        """The adapter that is part of the reference, if there is one."""
        lora = None if self._adapted is None else self._adapted.lora
        return lora if lora is not None and lora.adapter is not None else None

    def _choose_layout(self, model: CausalLM, machine: Machine, splits: PreferenceSplits) -> RowLayout:
        self.layout = choose_layout(
            model,
            splits.tables["train"],
            self.prefix_sharing,
            name=self.source.name,
            attention=self.source.attn_implementation,
            pad_id=splits.pad_id,
            context=machine.context,
        )
        self.attention = model.config._attn_implementation
        return self.layout

    def _hsic(self) -> bool:
        return self.options.comprehension and self._loss is not None and self._loss.estimator == "hsic"

    def _cache_root(self) -> Path:
        return Path(self.options.cache_dir).expanduser() if self.options.cache_dir else default_cache_dir()

    def _key(self, table: PairTable, machine: Machine) -> dict[str, Any]:
        """Return everything that the scores of `table` depend on."""
        assert self._splits is not None
        return {
            "format": 2,
            # Token ids, boundaries and null prompt: they result from template, truncation and tokenizer.
            "pairs": table.content_digest(),
            "template": self._splits.chat_template,
            "truncation": repr(self._splits.truncation),
            "model": model_fingerprint(self.source),
            "revision": self.source.revision,
            "dtype": str(self.dtype),
            "precision": machine.precision,
            "attention": self.source.attn_implementation,
            "quantization": None if self._adapted is None else self._adapted.quantization,
            "prefix_sharing": self.prefix_sharing,
            "device": machine.device.type,
            "kernels": bdpo_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "comprehension": self.options.comprehension,
            "hsic": self._hsic(),
            # Left out if unused, so that scores of earlier versions stay valid.
            **({} if self._loss is None or self._loss.tail_weight is None else {"first": True}),
            **({} if self._adapter is None else {"adapter": self._adapter.digest()}),
            **({} if (half := _dtype_of_all(machine)) is None else {"split": str(half)}),
            # Earlier versions rounded it.
            **({"head_bias": "whole"} if self._keeps_head_bias(machine) else {}),
        }

    def _keeps_head_bias(self, machine: Machine) -> bool:
        """Return true if the LM head has a bias that is held in another dtype than the weights of its products."""
        if machine.together or self._adapted is not None or autocast_dtype(machine.precision) in (None, self.dtype):
            return False
        if self._head_bias is None:
            try:
                with torch.device("meta"):
                    built = model_class(self.source, load_config(self.source), self.dtype, generates=False)
            except InputError:  # a model that cannot be built without its weights may have one
                self._head_bias = True
            else:
                self._head_bias = head_bias(built) is not None
        return self._head_bias


def _dtype_of_all(machine: Machine) -> torch.dtype | None:
    """Return the dtype to which FSDP2 casts every weight, even those that autocast leaves; None: it does not."""
    split = machine.together and (machine.world_size > 1 or machine.cpu_offload)
    return half_products(machine.precision) if split else None
