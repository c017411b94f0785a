"""The models that are evaluated: a Hugging Face folder or hub name, or a checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from bdpo_pl import embedded
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.models.checkpoint import checkpoint_model, read_checkpoint
from bdpo_pl.models.loading import ModelSource, frozen, load_model, load_tokenizer, model_fingerprint


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        label: its name in the report.
        source: the model, or for a checkpoint the one that it was trained from.
        checkpoint: weights in place of the source's.
    """

    label: str
    source: ModelSource
    checkpoint: Path | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The source's.

        Raises:
            InputError: there is none to be had.
        """
        return load_tokenizer(self.source)

    @cached_property
    def _own_fingerprint(self) -> str:
        # A digest over all of its files.
        return model_fingerprint(self.source)

    def fingerprint(self) -> str:
        """What identifies its weights."""
        own = self._own_fingerprint
        if self.checkpoint is None:
            return own
        status = self.checkpoint.stat()
        # A checkpoint may be tens of gigabytes: size and time tell it from the next.
        return f"{own}+{self.checkpoint.resolve()}:{status.st_size}:{status.st_mtime_ns}"

    def load(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
        """(model in evaluation mode on `device`, its tokenizer).

        Raises:
            InputError: it cannot be loaded.
        """
        tokenizer = self.tokenizer
        model: Any
        if self.checkpoint is None:
            model = load_model(self.source, dtype)
        else:
            model = checkpoint_model(self.checkpoint, self.source, dtype)
            model.config.use_cache = False
        return frozen(model, device), tokenizer


def subject(text: str, *, trust_remote_code: bool = False, attn_implementation: str | None = None) -> Subject:
    """The model that `text` names: `[label=]name[@revision]`.

    Args:
        text: the name is a folder, a hub name, a `.ckpt` file of a run, or `embedded`; a revision is the hub's.
        trust_remote_code: run Python code that comes with it.
        attn_implementation: as in transformers.

    Raises:
        InputError: a checkpoint that is not there or is not one of `bdpo_pl.fit`.
    """
    label, has_label, name = text.partition("=")
    # Checkpoints of fit have names such as best-step=75.ckpt.
    if "/" in label or Path(text).expanduser().exists():
        has_label = ""
    name = name if has_label else text
    revision = None
    if not Path(name).expanduser().exists() and "@" in name:
        name, _, revision = name.rpartition("@")
    label = label if has_label else _short(name)
    if not label or not name:
        raise InputError(f"models: {text!r} names no model; give a folder, a hub name, a checkpoint or label=model")
    checkpoint = None
    if name.endswith(".ckpt"):
        checkpoint = Path(name).expanduser()
        saved = read_checkpoint(checkpoint)["bdpo_pl"]
        name, revision = saved["policy"], saved["revision"]
    elif name == EMBEDDED:
        name = str(embedded.MODEL_DIR)
    return Subject(label, ModelSource(name, revision, attn_implementation, trust_remote_code), checkpoint)


def _short(name: str) -> str:
    """A name for reports: of an exported model, that of its run."""
    parts = Path(name).parts
    if name.endswith(".ckpt") and len(parts) > 2:
        return f"{parts[-3]}/{Path(name).stem}"
    if len(parts) > 1 and parts[-1].startswith("model"):
        return parts[-2] if parts[-1] == "model" else f"{parts[-2]}/{parts[-1]}"
    return "/".join(parts[-2:]) if not Path(name).is_absolute() else parts[-1]


def newest_run(root: Path) -> Path | None:
    """The model folder that the newest run of the embedded model under `root` exported, if there is one."""
    models = [path for path in root.glob("version_*/model*") if (path / "config.json").exists() and _aligns(path)]
    return max(models, key=lambda path: path.stat().st_mtime_ns, default=None)


def _aligns(model: Path) -> bool:
    """Whether the run that exported `model` began with the embedded one."""
    try:
        config = yaml.safe_load((model.parent / "config.yaml").read_text(encoding="utf-8"))
        return config["model"]["policy"] in (EMBEDDED, str(embedded.MODEL_DIR))
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return False
