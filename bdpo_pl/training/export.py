"""Export of a trained policy as a plain Hugging Face folder, and of its adapters in peft's format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor

from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.files import free_folder, write_whole_folder
from bdpo_pl.models.adapter_export import export_adapter
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.checkpoint import checkpoint_model, plain_model, policy_state, read_checkpoint
from bdpo_pl.models.loading import ModelSource, load_model, processor_files
from bdpo_pl.training.module import PreferenceModule


def export_policy(
    policy: CausalLM, tokenizer: TokenizerLike, folder: Path, card: str | None = None, source: ModelSource | None = None
) -> Path:
    """Write weights (safetensors), config, generation config, tokenizer and chat template to `folder`.

    `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load it. The folder appears only when it
    is complete.

    Args:
        policy: transformers model.
        tokenizer: tokenizer of the model.
        folder: folder to write, which must not exist yet.
        card: text of the README.
        source: model whose processors of images, video and sound are exported too, if it has any.
    """

    def write(partial: Path) -> None:
        # Training does not use the key/value cache, but generation does.
        policy.config.use_cache = True
        policy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _forget_machine(partial / "tokenizer_config.json")
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if source is not None:
            for file in processor_files(source):
                shutil.copy(file, partial / file.name)

    return write_whole_folder(folder, write)


def export_model(
    module: PreferenceModule,
    tokenizer: TokenizerLike,
    folder: Path,
    state: dict[str, Tensor] | None,
    best: Path | None,
    card: str | None = None,
) -> Path:
    """Export the policy of `module`, with adapters merged, to `folder` or the next free name; return the folder.

    Args:
        module: module after training.
        tokenizer: tokenizer of the policy.
        folder: folder to write.
        state: weights from `whole_state`, if the policy in memory is not a plain model.
        best: checkpoint whose weights are exported instead of the last ones.
        card: text of the README.
    """
    policy = module.policy
    if best is not None:
        policy = checkpoint_model(best, module.source, module.dtype_used)
    elif state is not None:
        policy = plain_model(module.source, module.dtype_used, state, module.lora)
    return export_policy(policy, tokenizer, free_folder(folder), card, module.source)


def export_adapters(
    module: PreferenceModule, folder: Path, state: dict[str, Tensor], best: Path | None, card: str | None = None
) -> Path:
    """Export the adapters in `state` to `folder` or the next free name; return the folder.

    Args:
        module: module after training.
        folder: folder to write.
        state: weights from `whole_state`.
        best: checkpoint whose adapters are exported instead of those in `state`.
        card: text of the README, instead of peft's empty one.
    """
    if best is not None:
        state = policy_state(read_checkpoint(best))
    lora, base = module.lora, load_model(module.source, module.dtype_used)
    assert lora is not None

    def write(partial: Path) -> None:
        export_adapter(base, lora, state, partial)
        (partial / "README.md").unlink(missing_ok=True)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")

    return write_whole_folder(free_folder(folder), write)


def _forget_machine(config: Path) -> None:
    """Remove from a saved tokenizer's settings that this machine looked for its files locally."""
    if not config.is_file():
        return
    settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.pop("local_files_only", None) is not None:
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
