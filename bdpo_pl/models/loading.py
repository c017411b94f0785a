"""Loading of models and tokenizers, with errors found before training starts.

Nothing is fetched or executed that the user did not name: code from the hub is not run without `trust_remote_code`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError, first_line, is_out_of_memory
from bdpo_pl.models.architectures import auto_class, decoder_layers
from bdpo_pl.models.causal_lm import CausalLM, ModelConfig
from bdpo_pl.models.folder import check_folder, file_digest, files_digest, gguf_file, text_digest
from bdpo_pl.models.noise import silence_modules, without_noise

GENERATION_FILE = "generation_config.json"

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class ModelSource:
    """A causal language model, and how to load it.

    Attributes:
        name: folder in the Hugging Face layout, a GGUF file, or a name on the hub.
        revision: git revision on the hub; set it to make a run repeatable.
        attn_implementation: attention implementation of transformers (`sdpa`, `eager`, `flash_attention_2`, …); None:
            transformers chooses.
        trust_remote_code: run Python code that comes with the model. Off by default, because it runs with your
            permissions.
    """

    name: str
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @property
    def location(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that locate the model."""
        file = gguf_file(self.name)
        place = {"pretrained_model_name_or_path": self.name} if file is None else {
            "pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name
        }  # fmt: skip
        return {**place, "revision": self.revision, "trust_remote_code": self.trust_remote_code}


def load_tokenizer(source: ModelSource) -> TokenizerLike:
    """Load the fast tokenizer of `source`.

    Raises:
        InputError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    check_folder(source.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source.location)
    except Exception as error:  # missing, gated, malformed, code refused: all mean that there is no tokenizer
        raise InputError(f"cannot load a tokenizer from {source.name!r}: {_reason(error)}") from error
    # Without tokenizer files, transformers makes an empty tokenizer.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(
            f"{source.name} has no tokenizer: transformers would make an empty one that cannot read text; copy "
            "tokenizer.json and tokenizer_config.json into the folder, or name another folder with data.tokenizer"
        )
    return tokenizer


def load_config(source: ModelSource) -> ModelConfig:
    """Load the configuration of `source`, with every dropout and other noise set to zero.

    Raises:
        InputError: there is no model of that name.
    """
    from transformers import AutoConfig

    check_folder(source.name)
    try:
        config = AutoConfig.from_pretrained(**source.location)
    except Exception as error:
        raise InputError(f"cannot load a model from {source.name!r}: {_reason(error)}") from error
    return without_noise(config)


def model_class(source: ModelSource, config: ModelConfig, dtype: torch.dtype, *, generates: bool = True) -> CausalLM:
    """Build a model of `source`'s architecture without its weights.

    Under `torch.device("meta")` it takes no memory.

    Args:
        source: model whose architecture it has.
        config: its configuration.
        dtype: dtype of its weights.
        generates: give it the settings of generation too, for which a hub may be asked.

    Raises:
        InputError: transformers has no causal language model of that configuration.
    """
    kwargs = {} if source.attn_implementation is None else {"attn_implementation": source.attn_implementation}
    try:
        model = auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=source.trust_remote_code, **kwargs
        )
    except Exception as error:
        raise InputError(f"cannot build a causal language model of {source.name!r}: {_reason(error)}") from error
    if generates:
        _read_generation_settings(model, source)
    return silence_modules(model)


def _read_generation_settings(model: CausalLM, source: ModelSource) -> None:
    """Give `model` the settings of generation that `from_pretrained` gives it; many name a second stop token.

    Raises:
        InputError: the file of settings cannot be read.
    """
    from transformers import GenerationConfig

    if getattr(model, "generation_config", None) is None or gguf_file(source.name) is not None:
        return
    # A model without a file of settings may have some in its configuration.
    for file, more in ((GENERATION_FILE, {}), ("config.json", {"_from_model_config": True})):
        try:
            model.generation_config = GenerationConfig.from_pretrained(
                source.name, config_file_name=file, revision=source.revision, **more
            )
        except OSError:
            if file == GENERATION_FILE and (Path(source.name).expanduser() / file).is_file():
                raise InputError(f"{source.name}: {file} is not valid JSON; fetch it again") from None
        else:
            return


def load_model(
    source: ModelSource, dtype: torch.dtype, quantization: object = None, device: torch.device | None = None
) -> CausalLM:
    """Load the causal language model of `source`, without dropout.

    Args:
        source: model to load.
        dtype: dtype of the weights.
        quantization: transformers configuration for quantising the weights, which are then on `device`.
        device: device of quantised weights, given for a model that will be trained. Default: the CPU.

    Raises:
        InputError: there is no causal language model of that name, its weights do not load, or it will be trained and
            its weights are quantised in its files.
    """
    config = load_config(source)
    if device is not None:
        check_not_quantised(config, source.name)
    kwargs: dict[str, Any] = {}
    if source.attn_implementation is not None:
        kwargs["attn_implementation"] = source.attn_implementation
    if quantization is not None:
        kwargs |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        model, info = auto_class(config).from_pretrained(
            **source.location, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"cannot load a causal language model from {source.name!r}: {_reason(error)}") from error
    require_all_weights(info, f"{source.name}: the checkpoint", model, "a causal language model's")
    if gguf_file(source.name) is not None:
        # Its weights are no longer quantised, and it is trained and saved as a model with plain weights.
        model.hf_quantizer = None
        for attribute in ("is_quantized", "quantization_method"):
            vars(model).pop(attribute, None)
        vars(model.config).pop("quantization_config", None)
    model.config.use_cache = False
    return silence_modules(model)


def require_all_weights(info: Mapping[str, Iterable[str]], checkpoint: str, model: nn.Module, whose: str) -> None:
    """Raise `InputError` if a checkpoint lacks weights: transformers would only warn, and fill in random numbers.

    Args:
        info: report of `from_pretrained`.
        checkpoint: name of the checkpoint, for the message.
        model: model that was loaded.
        whose: kind of model that the checkpoint should be of, for the message.
    """
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{checkpoint} lacks {len(missing)} weights of {type(model).__name__} (first: {', '.join(missing[:3])}); "
            f"is it {whose}, and whole?"
        )


def processor_files(source: ModelSource) -> list[Path]:
    """Find the files of `source` that define how images, video and sound are converted to its input."""
    from transformers.utils import cached_file

    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    folder = Path(source.name).expanduser()
    if gguf_file(source.name) is not None:
        return []
    if folder.is_dir():
        return [folder / name for name in names if (folder / name).is_file()]
    # These files are fetched with the rest of the model, so files that it lacks are not requested again.
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = [cached_file(source.name, name, revision=source.revision, **quiet) for name in names]
    return [Path(file) for file in found if file is not None]


def hold_products_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in `dtype`, the dtype of autocast: half the memory, the same results.

    All other weights keep their dtype, also those that a linear layer shares with an embedding, because autocast does
    not cast embeddings, and the bias of the LM head, which the kernels add to float32 logits.
    """
    kept = head_bias(model)
    shared: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    for module in model.modules():
        if type(module) is nn.Linear:
            for parameter in module.parameters(recurse=False):
                if shared[id(parameter)] == 1 and parameter is not kept:
                    parameter.data = parameter.data.to(dtype)


def head_bias(model: nn.Module) -> nn.Parameter | None:
    """Return the bias of the LM head of `model`; None if it has none."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else getattr(find(), "bias", None)


def frozen(model: _Model, device: torch.device | None = None) -> _Model:
    """Put `model` into evaluation mode, without gradients of its weights, and move it to `device` if one is given."""
    model = model.requires_grad_(False).eval()
    return model if device is None else model.to(device)


def enable_activation_checkpointing(model: CausalLM) -> None:
    """Recompute the activations of each layer in the backward pass.

    Raises:
        InputError: the architecture does not support it.
    """
    # Newer versions of transformers warn about the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"model.gradient_checkpointing: {error}") from error


def check_backend(backend: str) -> None:
    """Raise `InputError` if `torch.compile` has no such backend."""
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise InputError(f"model.compile: there is no backend {backend!r}; choose one of {', '.join(known)}")


def compile_layers(model: CausalLM, backend: str) -> None:
    """Compile each decoder layer: one compilation serves all, and hooks around the LM head are not compiled.

    Raises:
        InputError: there is no such backend, or the layers of the model are not recognised.
    """
    check_backend(backend)
    layers = decoder_layers(model)
    if layers is None:
        raise InputError(f"model.compile: the layers of {type(model).__name__} are not recognised; leave it unset")
    for layer in layers:
        layer.compile(backend=backend)


def num_positions(config: ModelConfig) -> int | None:
    """Return the maximum number of positions of the model; None if its configuration sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_window(config: ModelConfig, max_length: int, name: str) -> None:
    """Raise `InputError` if sequences of `max_length` tokens exceed the positions the model has."""
    window = num_positions(config)
    if window is not None and max_length > window:
        raise InputError(
            f"data.max_length is {max_length}, but {name} has positions for {window} tokens; lower data.max_length"
        )


def check_not_quantised(config: ModelConfig, name: str) -> None:
    """Raise `InputError` if the model's files hold quantised weights, which cannot be trained.

    Only its norms and biases would learn. Files that are dequantised on loading are accepted.
    """
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if not stored:
            continue
        options = stored if isinstance(stored, Mapping) else vars(stored)
        if options.get("dequantize"):
            continue
        method = getattr(options.get("quant_method"), "value", options.get("quant_method")) or "unknown"
        raise InputError(
            f"the weights of {name} are quantised in its files ({method}), so they cannot be trained; give the model "
            "that it was made from, unquantised (with model.lora.quantize=nf4 for QLoRA)"
        )


def check_vocabulary(config: ModelConfig, ids: Iterable[int], name: str) -> None:
    """Raise `InputError` if the model has no embedding for one of the token `ids` that it will read.

    A tokenizer may know more tokens than the model embeds (Gemma 3's `<image_soft_token>`); a token that the data do
    not contain is harmless.
    """
    rows = config.get_text_config().vocab_size
    largest = max(ids, default=0)
    if largest >= rows:
        raise InputError(
            f"the data hold token {largest}, but {name} embeds only {rows} tokens: tokenizer and model do not belong "
            "together; check data.tokenizer"
        )


def model_fingerprint(source: ModelSource) -> str:
    """Return an identifier of the contents of `source`.

    It is the commit of a hub model, else a SHA-256 over all files that affect the outputs.
    """
    check_folder(source.name)
    if (file := gguf_file(source.name)) is not None:
        return file_digest(file)
    folder = Path(source.name).expanduser()
    if not folder.is_dir():
        commit = getattr(load_config(source), "_commit_hash", None)
        return f"{source.name}@{commit or source.revision}"
    return files_digest(folder)


def tokenizer_fingerprint(tokenizer: TokenizerLike) -> str:
    """Return a SHA-256 over all that affects how `tokenizer` reads a text, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described: Any = sorted(tokenizer.get_vocab().items())
    else:
        described = json.loads(backend.to_str())
        # These are settings of the last call, not of the tokenizer.
        described.pop("truncation", None)
        described.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return text_digest(json.dumps([described, special], sort_keys=True))


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError) and "gguf" in str(error).lower():
        return 'a GGUF file is read by the package gguf; pip install "bdpo-pl[gguf]"'
    if "trust_remote_code" in str(error):
        return (
            "it runs Python code that comes with it. Read that code first; to run it, with your permissions, set "
            "model.trust_remote_code to true"
        )
    return f"{type(error).__name__}: {first_line(error)}"
