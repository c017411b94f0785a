"""The traits of a run: digests of what it reads, and the options that determine what it computes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from bdpo_pl.data.held_out import HELD_OUT
from bdpo_pl.errors import InputError
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.models.adapter_folder import digest_with_adapter
from bdpo_pl.models.folder import text_digest
from bdpo_pl.models.loading import model_fingerprint, tokenizer_fingerprint
from bdpo_pl.parallel.ranks import data_ranks
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.optim import parameter_groups

OPTIMIZER = "optimizer"
SAFETY = "safety of the data"
HELD_OUT_TRAITS = ("held-out data", "labels of the held-out data", "safety of the held-out data")
"""Names of traits of held-out pairs; those of one of several sets have its name after a comma."""

VALIDATED = "limit_val_batches"

_MEASURE = ("data", *HELD_OUT_TRAITS, SAFETY, VALIDATED, "tokenizer", "template", "policy", "reference", "loss")
"""First words of traits on which measured values depend."""


@dataclass(frozen=True)
class Trait:
    """One trait of a run.

    Attributes:
        value: value that is compared: a digest or plain values.
        shown: text in messages.
    """

    value: Any
    shown: str

    def to_plain(self) -> dict[str, Any]:
        """Return the trait as values that a checkpoint may contain."""
        return {"value": self.value, "shown": self.shown}


def change_measures(differs: Iterable[str]) -> list[str]:
    """Return those traits of `differs` for which values measured before and after the change are no comparison."""
    return sorted(name for name in differs if name.startswith(_MEASURE))


def describe_run(trainer: L.Trainer, module: PreferenceModule, data: PreferenceDataModule) -> dict[str, Trait]:
    """Return the traits of this run by name; its data must be loaded.

    Raises:
        InputError: the optimiser refuses its options.
    """
    table = data.tables["train"]
    content = table.content_digest()
    if table.weights is not None:
        content = text_digest(f"{content} {_sha_of(table.weights)}")
    if table.desirable is not None:
        content = text_digest(f"{content} labels {_sha_of(table.desirable)}")
    traits = {"data": _digest(content, f"{len(table):,} pairs of {data.train_source}")}
    if module.loss.needs_safety and table.safe is not None:
        traits[SAFETY] = _safety(table.safe)
    traits[HELD_OUT_TRAITS[0]] = Trait(None, "none")
    for split, held_out in data.tables.items():
        if split.startswith(HELD_OUT):
            _, _, name = split.partition("/")
            pairs, labels, safety = (f"{trait}, {name}" if name else trait for trait in HELD_OUT_TRAITS)
            traits[pairs] = _digest(held_out.content_digest(), f"{len(held_out):,} pairs")
            if (good := held_out.desirable) is not None:
                traits[labels] = _digest(_sha_of(good), f"{int(good.sum()):,} good of {good.size:,} answers")
            if module.loss.needs_safety and held_out.safe is not None:
                traits[safety] = _safety(held_out.safe)
    traits["tokenizer"] = _digest(tokenizer_fingerprint(data.tokenizer), str(data.tokenizer.name_or_path))
    template = None if data.chat_template == "none" else data.tokenizer.chat_template
    traits["template"] = (
        Trait(None, "none") if not template else _digest(text_digest(str(template)), data.chat_template)
    )
    if module.lora is not None:
        # The checkpoint contains the adapters alone.
        digest = digest_with_adapter(model_fingerprint(module.source), module.lora.digest())
        traits["policy"] = _digest(digest, module.source.name)
    traits["reference"] = _reference(module, trainer)
    traits |= loss_traits(module.loss, "loss")
    traits |= _optimizer_traits(module)
    traits["lr_schedule"] = _plain(module.lr_schedule)
    traits["warmup_ratio"] = _plain(module.warmup_ratio)
    for name in ("max_epochs", "max_steps", "limit_train_batches", "gradient_clip_val"):
        traits[name] = _plain(getattr(trainer, name))
    if type(trainer.limit_train_batches) is int and trainer.limit_train_batches == 1:
        # An int counts batches: 1 is not 1.0, all of them, but compares as equal.
        traits["limit_train_batches"] = _plain("1 batch")
    traits["gradient_clip_algorithm"] = _plain(str(getattr(trainer.gradient_clip_algorithm, "value", "norm")))
    traits["router_aux_loss"] = _plain(module.router_aux_loss)
    if (sync := module.sync.options).every is not None:
        traits["reference sync"] = _plain([sync.every, sync.mixup])
    traits["re-estimation"] = _plain(module.reestimation.every_n_steps)
    traits["precision"] = _plain(f"{trainer.precision}, weights in {module.dtype_used}")
    traits["batches"] = _batches(trainer, data)
    traits[VALIDATED] = _validated(trainer, data)
    traits["seed"] = _plain(int(os.environ.get("PL_GLOBAL_SEED", data.seed)))
    return traits


def loss_traits(loss: PreferenceLoss, name: str) -> dict[str, Trait]:
    """Return one trait for the classes of the loss and of its inner losses, and one for each of their options."""
    inner = _inner_losses(loss)
    parts: dict[str, Trait] = {}
    for place, part in inner.items():
        parts |= loss_traits(part, f"{name}.{place}")
    made_of = ", ".join(str(parts.pop(f"{name}.{place}").value) for place in inner)
    kind = f"{type(loss).__module__}.{type(loss).__qualname__}"
    traits = {name: _plain(f"{kind}({made_of})" if inner else kind)}
    for option, value in sorted(vars(loss).items()):
        values = value if isinstance(value, list | tuple) else [value]
        if not option.startswith("_") and all(isinstance(v, None | bool | int | float | str) for v in values):
            traits[f"{name}.{option}"] = _plain(value)
    return traits | parts


def _inner_losses(loss: PreferenceLoss) -> dict[str, PreferenceLoss]:
    """Return the losses among the attributes of `loss`, alone or in sequences, each once, by name or index."""
    found: dict[str, PreferenceLoss] = {}
    kept = [(name.lstrip("_"), value) for name, value in vars(loss).items()]
    # Single losses first: an attribute's name says more than an index in a sequence.
    for name, value in sorted(kept, key=lambda item: isinstance(item[1], list | tuple)):
        places = enumerate(value) if isinstance(value, list | tuple) else [("", value)]
        for i, part in places:
            if isinstance(part, PreferenceLoss) and all(part is not other for other in found.values()):
                found[name if i == "" else str(i)] = part
    return found


def _optimizer_traits(module: PreferenceModule) -> dict[str, Trait]:
    """Return the optimiser's class and options, from one made for two small parameters before the policy exists."""
    model = nn.Module()
    model.matrix, model.vector = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))
    optimizer = checked_optimizer(module.optimizer, model)
    options = {
        name: value
        for name, value in optimizer.param_groups[0].items()
        if name not in ("params", "initial_lr") and isinstance(value, None | bool | int | float | str | tuple | list)
    }
    traits = {OPTIMIZER: _plain(f"{type(optimizer).__module__}.{type(optimizer).__qualname__}")}
    return traits | {f"{OPTIMIZER}.{name}": _plain(value) for name, value in options.items()}


def checked_optimizer(make: Callable[[Any], torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimiser of the parameters of `model`.

    Raises:
        InputError: the optimiser refuses its options.
    """
    try:
        return make(parameter_groups(model))
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model.optimizer: {error}") from error


def _reference(module: PreferenceModule, trainer: L.Trainer) -> Trait:
    if module.reference_mode == "none":
        return Trait(None, "none")
    source = module.reference_source
    dtype = module.dtype_of_reference(str(trainer.precision))
    adapter = module.lora.digest() if module.lora is not None and module.own_reference else None
    digest = text_digest(f"{model_fingerprint(source)} {source.revision} {dtype}" + (f" {adapter}" if adapter else ""))
    return _digest(digest, f"{source.name} in {str(dtype).removeprefix('torch.')}")


def _batches(trainer: L.Trainer, data: PreferenceDataModule) -> Trait:
    _, ranks = data_ranks(trainer)
    accumulate = trainer.accumulate_grad_batches
    if data.max_tokens_per_batch is not None:
        value: list[Any] = ["tokens", data.max_tokens_per_batch, ranks, accumulate]
        return Trait(value, f"{data.max_tokens_per_batch} tokens on each of {ranks} ranks, {accumulate} to a step")
    # Ranks take pairs in the epoch's order, so two ranks with four pairs each equal one rank with eight.
    pairs = data.batch_size * ranks
    return Trait(["pairs", pairs, accumulate], f"{pairs} pairs over all ranks, {accumulate} to a step")


def _validated(trainer: L.Trainer, data: PreferenceDataModule) -> Trait:
    limit = trainer.limit_val_batches
    if isinstance(limit, float) and limit == 1.0:
        return Trait(None, "all")
    _, ranks = data_ranks(trainer)
    size, unit = data.max_tokens_per_batch, "tokens"
    if size is None:
        size, unit = data.eval_batch_size, "pairs"
    return Trait([str(limit), size, unit, ranks], f"{limit}, of batches of {size} {unit} on each of {ranks} ranks")


def _safety(safe: np.ndarray) -> Trait:
    return _digest(_sha_of(safe), f"{int((~safe).sum()):,} unsafe of {safe.size:,} responses")


def _digest(digest: str, what: str) -> Trait:
    return Trait(digest, f"{what} (sha256 {digest[:12]})")


def _plain(value: object) -> Trait:
    plain = list(value) if isinstance(value, tuple) else value
    return Trait(plain, str(value))


def _sha_of(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()
