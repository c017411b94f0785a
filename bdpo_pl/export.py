"""Export of a trained policy as a plain Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def export_policy(policy: Any, tokenizer: Any, folder: Path) -> Path:
    """Write weights (safetensors), config, generation config, tokenizer and chat template to `folder`.

    `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load it. The folder appears only when it
    is complete.

    Args:
        policy: transformers model.
        tokenizer: its tokenizer.
        folder: must not exist yet.
    """

    def write(partial: Path) -> None:
        # Training had no use for the key/value cache; generation does.
        policy.config.use_cache = True
        policy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    return write_whole(folder, write)


def write_whole(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have `write` fill a folder under another name, and give it its own when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    partial.rename(folder)
    return folder
