"""The card of an exported model: what it was made from, how, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bdpo_pl import __version__
from bdpo_pl.training.summary import FEW_PAIRS

_TEMPLATES = Environment(  # noqa: S701 - Markdown, whose cells are escaped below
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True)
class ModelCard:
    """What a card says.

    Attributes:
        base: the model that was aligned; of a folder its last name, for the rest is the private affair of a machine.
        hub_name: its name on the hub, if it has one.
        loss: with its settings.
        facts: name → value.
        rows: measure, number, before and after.
        pairs: held-out pairs; None if there are none.
        safety: refusals were measured.
        adapter: the folder holds adapters alone.
    """

    base: str
    hub_name: str | None
    loss: str
    facts: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    pairs: int | None
    safety: bool
    adapter: bool = False

    def text(self) -> str:
        """The card as Markdown."""
        return _TEMPLATES.get_template("model_card.md.j2").render(
            base=_cell(self.base),
            hub_name=self.hub_name,
            library="peft" if self.adapter else "transformers",
            loss=self.loss,
            facts={name: _cell(value) for name, value in self.facts.items()},
            rows=[[_cell(cell) for cell in row] for row in self.rows],
            pairs=self.pairs,
            few=self.pairs is not None and self.pairs < FEW_PAIRS,
            safety=self.safety,
            adapter=self.adapter,
            version=__version__,
        )

    def of_adapter(self) -> ModelCard:
        """The card of the adapters alone."""
        return replace(self, adapter=True)


def describe(trainer: Any, module: Any, data: Any, rows: Sequence[Sequence[str]], safety: bool) -> ModelCard:
    """The card of a finished run.

    Args:
        trainer: of the run.
        module: its `PreferenceModule`.
        data: its `PreferenceDataModule`.
        rows: of the closing table.
        safety: refusals were measured.
    """
    name = module.source.name
    held_out = data.tables.get("held_out")
    base = Path(name).name if Path(name).exists() else name
    loss = settings_of(module.loss)
    return ModelCard(
        base,
        None if Path(name).exists() else name,
        loss,
        {
            "base model": base + (f", revision {module.source.revision}" if module.source.revision else ""),
            "training pairs": f"{len(data.tables['train']):,} of {_source(data.train_source)}",
            "held-out pairs": "none" if held_out is None else f"{len(held_out):,}",
            **run_settings(trainer, module, data),
        },
        rows,
        None if held_out is None else len(held_out),
        safety,
    )


def run_settings(trainer: Any, module: Any, data: Any) -> dict[str, str]:
    """How a run was trained: name → value."""
    optimizer = trainer.optimizers[0]
    group = optimizer.param_groups[0]
    batch = f"{data.batch_size} pairs" if data.max_tokens_per_batch is None else f"{data.max_tokens_per_batch:,} tokens"
    batches = trainer.accumulate_grad_batches * trainer.world_size
    lora = module.lora
    return {
        "loss": settings_of(module.loss),
        "trained": "all weights" if lora is None else f"{lora.described}, merged",
        "optimiser": f"{type(optimizer).__name__}, learning rate {group.get('initial_lr', group['lr']):g}, "
        f"{module.lr_schedule} schedule, warm-up {module.warmup_ratio:.0%}, weight decay "
        f"{group.get('weight_decay', 0):g}",
        "steps": f"{module.global_step:,}, of {batches} batches of {batch}",
        "window": f"{data.truncation.max_length:,} tokens",
        "precision": str(trainer.precision),
    }


def settings_of(loss: Any) -> str:
    """A loss with its settings, as one would write it."""
    given = ", ".join(f"{k}={v}" for k, v in vars(loss).items() if not k.startswith(("_", "needs_", "initial_")))
    return f"{type(loss).__name__}({given})"


def _source(source: str) -> str:
    """The name of a data source, without the folders of the machine."""
    path = Path(source)
    return path.name if path.exists() else source


def _cell(text: str) -> str:
    """`text` as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
