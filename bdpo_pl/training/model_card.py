"""The card of an exported model: its base model, its training and its results."""

from __future__ import annotations

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


@dataclass(frozen=True)
class ModelCard:
    """The contents of a card.

    Attributes:
        base: name of the base model; for a folder only the last part of its path, because the rest may be private.
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
        """Return the card of the adapters."""
        return replace(self, adapter=True)


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
        weights: which weights are exported, if they were chosen.
    """
    name = module.source.name
    base = Path(name).name if Path(name).exists() else name
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
    batch = f"{data.batch_size} pairs" if data.max_tokens_per_batch is None else f"{data.max_tokens_per_batch:,} tokens"
    batches = trainer.accumulate_grad_batches * data_ranks(trainer)[1]
    lora = module.lora
    return {
        "loss": settings_of(module.loss),
        "trained": "all weights" if lora is None else f"{lora.described}, merged",
        "optimiser": f"{chosen_name(optimizer)}, learning rate {group.get('initial_lr', group['lr']):g}, "
        f"{module.lr_schedule} schedule, warm-up {module.warmup_ratio:.0%}, weight decay "
        f"{group.get('weight_decay', 0):g}",
        "steps": f"{module.global_step:,}, of {batches} batches of {batch}",
        "window": f"{data.truncation.max_length:,} tokens",
        "precision": str(trainer.precision),
    }


def settings_of(loss: PreferenceLoss) -> str:
    """Format a loss with its settings, as a call of its constructor."""
    given = ", ".join(f"{k}={v}" for k, v in vars(loss).items() if not k.startswith(("_", "needs_", "initial_")))
    return f"{type(loss).__name__}({given})"


def _source(source: str) -> str:
    """Return the name of a data source without the folders of this machine."""
    path = Path(source)
    return path.name if path.exists() else source


def _cell(text: str) -> str:
    """Escape `text` for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
