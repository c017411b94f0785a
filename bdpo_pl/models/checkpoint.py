"""Loading of a trained policy, from a checkpoint or from whole weights, as a plain model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError
from bdpo_pl.models.adapter_export import merged
from bdpo_pl.models.adapter_folder import adapter_digest, digest_with_adapter
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.folder import text_digest
from bdpo_pl.models.loading import ModelSource, load_config, load_model, model_class, tokenizer_fingerprint
from bdpo_pl.models.reach import unreached

_PREFIX = "policy."

RUN = "bdpo_pl_run"
"""Key of a checkpoint's part that describes its run."""


def plain_model(
    source: ModelSource, dtype: torch.dtype, state: dict[str, Tensor], lora: LoraOptions | None
) -> CausalLM:
    """Return a model of transformers on the CPU with the weights in `state` (from `whole_state`), adapters merged."""
    if lora is not None:
        return merged(load_model(source, dtype), lora, state)
    with torch.device("meta"):
        model = model_class(source, load_config(source), dtype)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    return model


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `bdpo_pl.fit` wrote; its tensors remain on disk.

    Raises:
        InputError: the file does not exist, is incomplete, or was written by another program.
    """
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path} (looked from {Path.cwd()})") from None
    except Exception as error:  # whatever the error is, the file is not a valid checkpoint
        raise InputError(f"{path} is not a whole checkpoint ({type(error).__name__})") from error
    if not isinstance(saved, dict) or "bdpo_pl" not in saved:
        raise InputError(f"{path} was not written by bdpo_pl.fit; give the folder of its exported model")
    return saved


def policy_state(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the policy's weights in a checkpoint from `read_checkpoint`, by their names in the policy."""
    weights = saved["state_dict"].items()
    return {name.removeprefix(_PREFIX): value for name, value in weights if name.startswith(_PREFIX)}


def require_same_reading(path: Path, tokenizer: TokenizerLike, name: str) -> None:
    """Raise `InputError` if the run of a checkpoint read its pairs in another way than `tokenizer` reads prompts.

    Checkpoints of earlier versions do not say how their run read its pairs.

    Args:
        path: path of the checkpoint.
        tokenizer: tokenizer of the model that the run began with.
        name: name of that model.
    """
    traits = _traits(read_checkpoint(path))
    template = str(tokenizer.chat_template or "")
    others = [
        f"another {what} than {name} has: {traits[trait]['shown']}"
        for what, trait, digest in (
            ("tokenizer", "tokenizer", tokenizer_fingerprint(tokenizer)),
            # A run without a template leaves that of its tokenizer as it is.
            ("chat template", "template", text_digest(template)),
        )
        if traits.get(trait, {}).get("value") not in (None, digest)
    ]
    if others:
        raise InputError(
            f"{path} is of a run with {'; and '.join(others)}. Its weights alone do not bring these along, and the "
            "model would be asked in another way than it was trained. Give the folder of its exported model, which has "
            "them; fit with --ckpt_path writes one if the run had export=false"
        )


def require_same_base(path: Path, source: ModelSource, fingerprint: str) -> None:
    """Raise `InputError` if the adapters of a checkpoint were trained on another model than `source` is now.

    Checkpoints of earlier versions do not say which model it was, nor do those of a run whose first adapter is gone.

    Args:
        path: path of the checkpoint; if it has no adapters, it has every weight of its own.
        source: model that the run began with.
        fingerprint: `model_fingerprint` of `source`.
    """
    saved = read_checkpoint(path)
    lora, began = saved["bdpo_pl"]["lora"], _traits(saved).get("policy")
    if lora is None or began is None:
        return
    also = ""
    if (adapter := lora.get("adapter")) is not None:
        try:
            fingerprint = digest_with_adapter(fingerprint, adapter_digest(adapter))
        except OSError:
            return
        also = f", or the adapter in {adapter},"
    if fingerprint != began["value"]:
        raise InputError(
            f"{path} holds adapters of {began['shown']}, and what is at {source.name} now{also} is something else, "
            "with which they were not trained. Put the former files back, or give the folder of the run's exported "
            "model"
        )


def _traits(saved: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the traits of the run that wrote a checkpoint; empty in those of earlier versions."""
    traits: Mapping[str, Mapping[str, Any]] = saved.get(RUN, {}).get("traits", {})
    return traits


def checkpoint_model(path: Path, source: ModelSource, dtype: torch.dtype) -> CausalLM:
    """Return a model of transformers on the CPU with the policy's weights of a checkpoint, adapters merged.

    Args:
        path: path of the checkpoint.
        source: model from which it was trained.
        dtype: dtype of the weights.

    Raises:
        InputError: the checkpoint cannot be read, or its weights are not those of a model like `source`.
    """
    saved = read_checkpoint(path)
    state = policy_state(saved)
    lora = saved["bdpo_pl"]["lora"]
    if lora is not None:
        return plain_model(source, dtype, state, LoraOptions.from_saved(lora, saved["bdpo_pl"].get("adapter_config")))
    # A whole model is loaded, because no checkpoint holds the rotary frequencies and the generation settings.
    model = load_model(source, dtype)
    found = model.load_state_dict(state, strict=False)
    left = set(found.missing_keys) - set(getattr(model, "all_tied_weights_keys", ())) - unreached(model)
    if left or found.unexpected_keys:
        raise InputError(
            f"{path} does not hold the weights of {source.name} (first that differs: "
            f"{min([*left, *found.unexpected_keys])}); the folder of its exported model may"
        )
    return model
