"""The identity of a run, saved in its checkpoints, so that a resumed run cannot silently become a different one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from bdpo_pl.data.held_out import HELD_OUT
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.models.loading import model_fingerprint
from bdpo_pl.parallel.ranks import data_ranks
from bdpo_pl.training.checkpoints import is_amid_accumulation, require_same_checkpoint
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.optim import parameter_groups

_KEY = "bdpo_pl_run"

MUST_AGREE = ("data", "tokenizer", "template", "policy", "reference", "loss")
"""Traits that define a run; a run is not resumed if one of them differs."""

_ORDER = {"batches", "seed"}
"""Traits that determine the order of the pairs: if one differs, the skipped batches contain other pairs."""

_OPTIMIZER = "optimizer"

_SAFETY = "safety of the data"
_ALLOWED_AS = {_SAFETY: "data"}
"""Traits that define a run as parts of another one, under whose name they are allowed."""

_NEWER = {_SAFETY, "router_aux_loss", "gradient_clip_algorithm"}
"""Traits that checkpoints of earlier versions lack: compared only where both runs have them."""


@dataclass
class ResumeOptions:
    """Differences between a resumed run and the run of its checkpoint.

    Args:
        allow: differences that are allowed, as `[loss, data]`: data, tokenizer, template, policy, reference, loss.
            Other differences are always allowed, and reported when the run is resumed.

    Raises:
        InputError: a name is none of these.
    """

    allow: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.allow) - set(MUST_AGREE))
        if unknown:
            raise InputError(
                f"resume.allow names {', '.join(unknown)}; what a resume stops for are {', '.join(MUST_AGREE)}"
            )


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


def describe_run(trainer: L.Trainer, module: PreferenceModule, data: PreferenceDataModule) -> dict[str, Trait]:
    """Return the traits of this run by name; its data must be loaded.

    Raises:
        InputError: the optimiser refuses its options.
    """
    table = data.tables["train"]
    content = table.content_digest()
    if table.weights is not None:
        content = _sha(f"{content} {hashlib.sha256(table.weights.tobytes()).hexdigest()}")
    if table.desirable is not None:
        content = _sha(f"{content} labels {hashlib.sha256(table.desirable.tobytes()).hexdigest()}")
    traits = {"data": _digest(content, f"{len(table):,} pairs of {data.train_source}")}
    if module.loss.needs_safety and table.safe is not None:
        flags = hashlib.sha256(table.safe.tobytes()).hexdigest()
        traits[_SAFETY] = _digest(flags, f"{int((~table.safe).sum()):,} unsafe of {table.safe.size:,} responses")
    traits["held-out data"] = Trait(None, "none")
    for split, held_out in data.tables.items():
        if split.startswith(HELD_OUT):
            _, _, name = split.partition("/")
            called = f"held-out data, {name}" if name else "held-out data"
            traits[called] = _digest(held_out.content_digest(), f"{len(held_out):,} pairs")
    traits["tokenizer"] = _digest(_tokenizer_digest(data.tokenizer), str(data.tokenizer.name_or_path))
    template = None if data.chat_template == "none" else data.tokenizer.chat_template
    traits["template"] = Trait(None, "none") if not template else _digest(_sha(str(template)), data.chat_template)
    if module.lora is not None:
        # The checkpoint contains the adapters alone.
        adapter = module.lora.digest()
        digest = model_fingerprint(module.source)
        traits["policy"] = _digest(digest if adapter is None else _sha(f"{digest} {adapter}"), module.source.name)
    traits["reference"] = _reference(module, trainer)
    traits |= _loss_traits(module.loss, "loss")
    traits |= _optimizer_traits(module)
    traits["lr_schedule"] = _plain(module.lr_schedule)
    traits["warmup_ratio"] = _plain(module.warmup_ratio)
    for name in ("max_epochs", "max_steps", "limit_train_batches", "gradient_clip_val"):
        traits[name] = _plain(getattr(trainer, name))
    traits["gradient_clip_algorithm"] = _plain(str(getattr(trainer.gradient_clip_algorithm, "value", "norm")))
    traits["router_aux_loss"] = _plain(module.router_aux_loss)
    if (sync := module.sync.options).every is not None:
        traits["reference sync"] = _plain([sync.every, sync.mixup])
    traits["re-estimation"] = _plain(module.reestimation.every_n_steps)
    traits["precision"] = _plain(f"{trainer.precision}, weights in {module.dtype_used}")
    traits["batches"] = _batches(trainer, data)
    traits["seed"] = _plain(int(os.environ.get("PL_GLOBAL_SEED", data.seed)))
    return traits


def check_resume(
    saved: Mapping[str, Mapping[str, Any]], now: Mapping[str, Trait], allow: Sequence[str], batches_done: int
) -> set[str]:
    """Compare the run of a checkpoint with this one, and log every difference.

    Args:
        saved: traits in the checkpoint.
        now: traits of this run.
        allow: names of allowed differences.
        batches_done: number of finished batches in the checkpoint's epoch.

    Returns:
        Names of the traits that differ.

    Raises:
        InputError: a trait differs that must agree and is not allowed, or the optimiser is of another class.
    """
    compared = [name for name in dict.fromkeys([*now, *saved]) if name not in _NEWER or (name in now and name in saved)]
    names = [name for name in compared if _value(saved.get(name)) != _value_of(now.get(name))]
    lines = {name: f"{name}: {_shown(saved.get(name))} → {_shown_of(now.get(name))}" for name in names}
    if _OPTIMIZER in names:
        raise InputError(
            f"the checkpoint holds the state of another optimiser ({lines[_OPTIMIZER]}), which the new one cannot take "
            "up: resume with model.optimizer as it was, or begin a new run from the exported model"
        )
    defining = {name: _ALLOWED_AS.get(name, name) for name in names if _ALLOWED_AS.get(name, name) in MUST_AGREE}
    refused = {name: allowed_as for name, allowed_as in defining.items() if allowed_as not in allow}
    if refused:
        raise InputError(
            "the checkpoint belongs to another run: "
            + "; ".join(lines[name] for name in refused)
            + ". Resume it with the data and options it was trained with, or, to continue with the change, add "
            f"--resume.allow '[{', '.join(sorted({*allow, *refused.values()}))}]'"
        )
    if names:
        rank_zero_info("The resumed run differs from the run of its checkpoint:")
    for name in names:
        if name in defining:
            what = "allowed"
        elif name in _ORDER:
            skipped = f", so the {batches_done} batches skipped as done are other pairs" if batches_done else ""
            what = f"another order{skipped}"
        else:
            what = "takes effect from here on"
        rank_zero_info(f"  {lines[name]} ({what})")
    return set(names)


class RunIdentity(L.Callback):
    """Saves the traits of the run in its checkpoints, and compares them when it is resumed, before the scoring pass.

    Lightning restores learning rate and schedule from the checkpoint; if the user gives others, they are applied here.

    Args:
        resume_from: checkpoint from which the run is resumed, if any.
        allow: allowed differences; see `ResumeOptions`.
    """

    def __init__(self, resume_from: str | None = None, allow: Sequence[str] = ()) -> None:
        self.resume_from = resume_from
        self.allow = tuple(allow)
        self.traits: dict[str, Trait] = {}
        self._compared = False
        self.differs: set[str] = set()
        self._options: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have the pairs read, describe the run, and compare it with the checkpoint's, before any pair is scored."""
        if stage != "fit" or self.traits:
            return
        require_same_checkpoint(trainer, self.resume_from, _KEY)
        assert isinstance(pl_module, PreferenceModule)
        pl_module.read_pairs()
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.traits = describe_run(trainer, pl_module, data)
        if self.resume_from is not None and Path(self.resume_from).is_file():
            # Its tensors remain on disk.
            checkpoint = torch.load(self.resume_from, map_location="cpu", mmap=True, weights_only=True)
            pl_module.check_reference_sync(checkpoint)
            self._compare(trainer, checkpoint)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the user's options of the optimiser before the checkpoint replaces them."""
        self._options = [
            {name: value for name, value in group.items() if name != "params"}
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply the optimiser's options and the schedule that the user gives now."""
        changed = {name.removeprefix("optimizer.") for name in self.differs if name.startswith("optimizer.")}
        schedule = {"lr_schedule", "warmup_ratio", "max_epochs", "max_steps", "limit_train_batches"} & self.differs
        if not (changed or schedule):
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # The scheduler computes its rates from this one.
        changed |= {"initial_lr"} if "lr" in changed else set()
        for group, given in zip(groups, self._options, strict=True):
            group.update({name: given[name] for name in changed if name in given})
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                continue
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the traits of the run and its validations so far, the first of which the final table shows."""
        assert isinstance(pl_module, PreferenceModule)
        checkpoint[_KEY] = {
            "traits": {name: trait.to_plain() for name, trait in self.traits.items()},
            "evaluations": {step: dict(values) for step, values in pl_module.evaluations.items()},
            "batches_done": trainer.datamodule.state_dict()["batches_done"],  # type: ignore[attr-defined]
            "amid_accumulation": is_amid_accumulation(trainer),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the validations; compare the runs if that could not be done earlier."""
        assert isinstance(pl_module, PreferenceModule)
        self._compare(trainer, checkpoint)
        earlier = checkpoint.get(_KEY, {}).get("evaluations", {})
        pl_module.evaluations = {**earlier, **pl_module.evaluations}

    def _compare(self, trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
        if self._compared:
            return
        self._compared = True
        saved = checkpoint.get(_KEY)
        if saved is None:
            rank_zero_info(
                "The checkpoint was written by an earlier version and does not record the data, loss and options of "
                "its run, so they cannot be compared with those of this run"
            )
            return
        self.differs = check_resume(saved["traits"], self.traits, self.allow, saved["batches_done"])
        if saved.get("amid_accumulation"):
            rank_zero_warn(
                "The checkpoint was written in the middle of an accumulation and does not contain its gradients: the "
                "run continues without them. last.ckpt is written between steps, and a run resumes from it exactly"
            )


def _loss_traits(loss: PreferenceLoss, name: str) -> dict[str, Trait]:
    """Return one trait for the classes of the loss and of its inner losses, and one for each of their options."""
    inner = _inner_losses(loss)
    parts: dict[str, Trait] = {}
    for place, part in inner.items():
        parts |= _loss_traits(part, f"{name}.{place}")
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
    traits = {_OPTIMIZER: _plain(f"{type(optimizer).__module__}.{type(optimizer).__qualname__}")}
    return traits | {f"{_OPTIMIZER}.{name}": _plain(value) for name, value in options.items()}


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
    digest = _sha(f"{model_fingerprint(source)} {source.revision} {dtype}" + (f" {adapter}" if adapter else ""))
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


def _tokenizer_digest(tokenizer: TokenizerLike) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described: Any = sorted(tokenizer.get_vocab().items())
    else:
        described = json.loads(backend.to_str())
        # These are settings of the last call, not of the tokenizer.
        described.pop("truncation", None)
        described.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _sha(json.dumps([described, special], sort_keys=True))


def _digest(digest: str, what: str) -> Trait:
    return Trait(digest, f"{what} (sha256 {digest[:12]})")


def _plain(value: object) -> Trait:
    plain = list(value) if isinstance(value, tuple) else value
    return Trait(plain, str(value))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _value(saved: Mapping[str, Any] | None) -> Any:
    return None if saved is None else saved["value"]


def _value_of(trait: Trait | None) -> Any:
    return None if trait is None else trait.value


def _shown(saved: Mapping[str, Any] | None) -> str:
    return "not given" if saved is None else str(saved["shown"])


def _shown_of(trait: Trait | None) -> str:
    return "not given" if trait is None else trait.shown
