"""Reading and checking of a LoRA adapter that peft saved: the start of a policy, and part of its reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.models.folder import check_links, file_digest, text_digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix that peft adds to the names of the base model."""

# Values with which an option of peft has no effect. Any other value would be lost here, so it is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"), "lora_bias": (None, False), "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []), "alora_invocation_tokens": (None, []), "use_qalora": (None, False),
    "use_bdlora": (None, False), "kasa_config": (None,), "velora_config": (None,), "arrow_config": (None,),
    "monteclora_config": (None,), "megatron_config": (None,),
}  # fmt: skip
# Initialisations that do not change the base model's weights.
_KEEPS_BASE = (None, True, False, "gaussian", "eva")


def read_config(folder: str) -> dict[str, Any]:
    """Read the configuration of the adapter in `folder`.

    Raises:
        InputError: there is no such adapter, it is not a LoRA adapter, or it has a feature that would be lost.
    """
    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        raise InputError(
            f"model.lora.adapter: no {CONFIG} in {folder!r} (looked from {Path.cwd()}); give the folder that peft's "
            "save_pretrained wrote; fetch an adapter from the hub with `hf download NAME --local-dir FOLDER`"
        )
    check_links(path)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / CONFIG}: not a configuration of peft ({type(error).__name__})") from None
    if kind != "LORA":
        raise InputError(f"{folder} is a {kind} adapter, and model.lora.adapter takes LoRA adapters; merge it instead")
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise InputError(
                f"{path / CONFIG}: {name} is {config[name]!r}, which would be lost here; merge the adapter into its "
                "base model (PeftModel.merge_and_unload, then save_pretrained) and train that folder"
            )
    if (start := config.get("init_lora_weights", True)) not in _KEEPS_BASE:
        raise InputError(
            f"{path / CONFIG}: init_lora_weights is {start!r}, which changed the base model's weights; save the "
            "adapter with path_initial_model_for_weight_conversion, or merge it, so that its base is the plain model"
        )
    return dict(config)


class AdapterFolder:
    """The tensors of an adapter.

    Args:
        folder: folder that peft's `save_pretrained` wrote.

    Raises:
        InputError: there are no weights in safetensors, or the file is damaged.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._path = Path(folder).expanduser() / WEIGHTS
        if not self._path.is_file():
            raise InputError(
                f"{folder} has no {WEIGHTS}: pickled weights are not read; load the adapter with peft and save it with "
                "save_pretrained"
            )
        try:
            self._file = safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self._path}: not a whole safetensors file ({error}); fetch or write it again") from None
        # With an adapter of an embedding, peft also saves the base weight, which the base model already has.
        self._unread = {key for key in self._file.keys() if ".base_layer." not in key}  # noqa: SIM118 - not a dict

    def __contains__(self, name: str) -> bool:
        return stored_name(name) in self._file.keys()  # noqa: SIM118 - not a dict

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read the tensor of the parameter `name`.

        Raises:
            InputError: the adapter does not have it, or it has another shape.
        """
        key = stored_name(name)
        if name not in self:
            raise InputError(
                f"{self.folder} has no weights for {key.removeprefix(PREFIX)}: it belongs to another model, or was "
                "written for other modules than its configuration names"
            )
        tensor = self._file.get_tensor(key)
        if tuple(tensor.shape) != tuple(shape):
            raise InputError(
                f"{self.folder}: {key.removeprefix(PREFIX)} has shape {tuple(tensor.shape)}, and the policy needs "
                f"{tuple(shape)}: it belongs to another model"
            )
        self._unread.discard(key)
        return tensor

    def check_all_read(self) -> None:
        """Raise `InputError` if the adapter has weights for which the policy has no place."""
        if self._unread:
            raise InputError(
                f"{self.folder} has {len(self._unread)} weights for which the policy has no place (first: "
                f"{min(self._unread).removeprefix(PREFIX)}); is it an adapter of this model?"
            )


def stored_name(name: str) -> str:
    """Return the name under which peft stores the parameter `name` of a model with adapters."""
    for part in ("lora_A", "lora_B"):
        name = name.replace(f".{part}.default.", f".{part}.")
    for part in ("lora_magnitude_vector.default.weight", "lora_embedding_A.default", "lora_embedding_B.default"):
        name = name.replace(f".{part}", f".{part.split('.')[0]}")
    return PREFIX + name


def digest_with_adapter(model: str, adapter: str | None) -> str:
    """Return the digest of a model with an adapter, of the digests of both; that of the model if it has none."""
    return model if adapter is None else text_digest(f"{model} {adapter}")


def adapter_digest(folder: str) -> str:
    """Return a digest of everything in `folder` that affects the outputs of the model with its adapter."""
    path = Path(folder).expanduser()
    return " ".join(file_digest(path / name) for name in (CONFIG, WEIGHTS))
