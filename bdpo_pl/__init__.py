"""Balanced DPO (arXiv:2603.22829) for open language models, on PyTorch Lightning.

What it offers is loaded when it is first used, so that a command's help and its
option errors do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdpo_pl.training.datamodule import PreferenceDataModule
    from bdpo_pl.training.module import PreferenceModule
    from bdpo_pl.training.resumable import resumable

__version__ = metadata.version("bdpo-pl")
__all__ = ["PreferenceDataModule", "PreferenceModule", "__version__", "resumable"]

_HOMES = {
    "PreferenceDataModule": "bdpo_pl.training.datamodule",
    "PreferenceModule": "bdpo_pl.training.module",
    "resumable": "bdpo_pl.training.resumable",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bdpo_pl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
