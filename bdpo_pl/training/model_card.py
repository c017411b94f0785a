"""The card of an exported model: its base model, its training and its results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bdpo_pl import __version__
from bdpo_pl.losses import BalancedDPOLoss, PreferenceLoss
from bdpo_pl.losses.base import papers_in
from bdpo_pl.parallel.ranks import data_ranks
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.optimizers import chosen_name
from bdpo_pl.training.single_words import worded
from bdpo_pl.training.summary import FEW_PAIRS

_TEMPLATES = Environment(  # noqa: S701 - Markdown, whose cells are escaped below
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True
)
_NO_OPTION = ("_", "needs_", "initial_")
_OF_RUN = re.compile(r"model(-\d+)?")
_MERGED = ", merged"
_RENAMED = {"weights": "factors"}
_UNKNOWN = object()


@dataclass(frozen=True)
class ModelCard:
    """The contents of a card.

    Attributes:
        base: name of the base model; for a folder only the end of its path, because the rest may be private.
        hub_name: name of the base model on the hub, if it has one.
        loss: loss with its settings.
        papers: arXiv numbers of the papers of the loss.
        facts: further facts by name.
        rows: rows of the final table: measure, number, before and after.
        pairs: number of held-out pairs that were measured; None without held-out pairs.
        safety: true if refusals were measured.
        adapter: true if the folder contains only adapters.
        unit: name of what was trained on, pairs or answers.
    """

    base: str
    hub_name: str | None
    loss: str
    papers: Sequence[str]
    facts: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    pairs: int | None
    safety: bool
    adapter: bool = False
    unit: str = "pairs"

    def text(self) -> str:
        """Return the card as Markdown."""
        return _TEMPLATES.get_template("model_card.md.j2").render(
            base=_cell(self.base),
            hub_name=self.hub_name,
            library="peft" if self.adapter else "transformers",
            loss=self.loss.split("(")[0],
            papers=self.papers,
            balanced=set(papers_in(BalancedDPOLoss.__doc__)) <= set(self.papers),
            facts={name: _cell(value) for name, value in self.facts.items()},
            rows=[[_cell(cell) for cell in row] for row in self.rows],
            pairs=self.pairs,
            unit=self.unit,
            few=self.pairs is not None and self.pairs < FEW_PAIRS,
            safety=self.safety,
            adapter=self.adapter,
            version=__version__,
        )

    def of_adapter(self) -> ModelCard:
        """Return the card of the adapters, which are not merged."""
        trained = {name: value.removesuffix(_MERGED) for name, value in self.facts.items() if name == "trained"}
        return replace(self, adapter=True, facts={**self.facts, **trained})


def describe(
    trainer: L.Trainer,
    module: PreferenceModule,
    data: PreferenceDataModule,
    rows: Sequence[Sequence[str]],
    pairs: int | None,
    safety: bool,
    weights: str = "",
) -> ModelCard:
    """Make the card of a finished run.

    Args:
        trainer: Trainer of the run.
        module: module of the run.
        data: data module of the run.
        rows: rows of the final table.
        pairs: number of held-out pairs that were measured; None without held-out pairs.
        safety: true if refusals were measured.
        weights: description of the exported weights, if they were chosen.
    """
    name = module.source.name
    base = base_name(name)
    loss, single = settings_of(module.loss), module.loss.needs_labels
    return ModelCard(
        base,
        None if Path(name).exists() else name,
        loss,
        module.loss.papers(),
        {
            "base model": base + (f", revision {module.source.revision}" if module.source.revision else ""),
            worded("training pairs", single): f"{len(data.tables['train']):,} of {_source(data.train_source)}",
            worded("held-out pairs", single): ", ".join(
                f"{n} {size:,}".strip() for n, size in module.splits.held_out_pairs.items()
            )
            or "none",
            **run_settings(trainer, module, data),
            **({"weights": weights} if weights else {}),
        },
        rows,
        pairs,
        safety,
        unit="answers" if single else "pairs",
    )


def run_settings(trainer: L.Trainer, module: PreferenceModule, data: PreferenceDataModule) -> dict[str, str]:
    """Return the settings of a run, by name."""
    optimizer = trainer.optimizers[0]
    group = optimizer.param_groups[0]
    unit = "answers" if module.loss.needs_labels else "pairs"
    batch = (
        f"{data.batch_size} {unit}" if data.max_tokens_per_batch is None else f"{data.max_tokens_per_batch:,} tokens"
    )
    batches = trainer.accumulate_grad_batches * data_ranks(trainer)[1]
    lora = module.lora
    return {
        "loss": settings_of(module.loss),
        "trained": "all weights" if lora is None else f"{lora.described}{_MERGED}",
        "optimiser": f"{chosen_name(optimizer)}, learning rate {group.get('initial_lr', group['lr']):g}, "
        f"{module.lr_schedule} schedule, warm-up {100 * module.warmup_ratio:g}%, weight decay "
        f"{group.get('weight_decay', 0):g}",
        "steps": f"{module.global_step:,}, of {batches} batches of {batch}",
        "window": f"{data.truncation.max_length:,} tokens",
        "precision": str(trainer.precision),
    }


def settings_of(loss: PreferenceLoss) -> str:
    """Format a loss with its settings, as a call of its constructor, with the losses that it is built from."""
    options = {name: _kept(loss, name) for name in inspect.signature(type(loss)).parameters}
    if _UNKNOWN in options.values():
        # A loss of someone's own may keep its arguments under other names.
        options = {k.lstrip("_"): v for k, v in vars(loss).items() if not k.startswith(_NO_OPTION) or _is_inner(v)}
    said = {name: _value(value) for name, value in options.items()}
    for name, value in loss.state_dict().items():
        if name in said:
            said[name] += f" (measured: {value:.4g})"
    return f"{type(loss).__name__}({', '.join(f'{name}={text}' for name, text in said.items())})"


def _kept(loss: PreferenceLoss, name: str) -> object:
    """Return the argument `name` of a loss's constructor, from where the loss keeps it; `_UNKNOWN` if it does not."""
    own = vars(loss)
    parts = own.get("_parts", ())
    if name == "losses" and parts:
        return parts
    if name == "loss" and "_loss" not in own and len(parts) == 1:
        return parts[0]
    # A sum keeps its weights under another name, and what balances a loss is a part of its own.
    balance = vars(own["_balance"]) if isinstance(own.get("_balance"), PreferenceLoss) else {}
    places = [(own, _RENAMED.get(name, name)), (own, f"_{name}"), (balance, name)]
    return next((place[key] for place, key in places if key in place), _UNKNOWN)


def _is_inner(value: object) -> bool:
    """Return true for a loss, or for several."""
    several = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(one, PreferenceLoss) for one in several)


def _value(value: object) -> str:
    if isinstance(value, PreferenceLoss):
        return settings_of(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(one) for one in value)}]"
    return str(value)


def base_name(name: str) -> str:
    """Return what a card calls a base model: a folder by its own name, `model` and `model-2` of a run by the run's."""
    path = Path(name)
    if not path.exists():
        return name
    parent = path.absolute().parent.name
    if not parent or not _OF_RUN.fullmatch(path.name):
        return path.name
    return parent if path.name == "model" else f"{parent}/{path.name}"


def _source(source: str) -> str:
    """Return the name of a data source without the folders of this machine."""
    path = Path(source)
    return path.name if path.exists() else source


def _cell(text: str) -> str:
    """Escape `text` for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
