"""Numbers of parameters of a model that is not loaded, and how it is spread over devices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bdpo_pl.models.adapters import LoraOptions, add_adapters
from bdpo_pl.models.architectures import decoder_layers
from bdpo_pl.models.causal_lm import ModelConfig
from bdpo_pl.models.loading import ModelSource, model_class
from bdpo_pl.training.optimizers import is_hidden_matrix, mark_kinds
from bdpo_pl.training.split_8bit import keeps_blocks


@dataclass(frozen=True)
class Devices:
    """The devices over which a model is distributed.

    Attributes:
        data: number of groups with different data.
        tensor: number of devices in a group, which share each layer.
        sharded: true if the groups share the weights (FSDP2); false if each group holds all (DDP, one device).
        kind: `cpu` or `cuda`.
        cpu_offload: true if weights, gradients and the optimiser's state are kept on the host.
    """

    data: int = 1
    tensor: int = 1
    sharded: bool = False
    kind: str = "cuda"
    cpu_offload: bool = False

    @property
    def gathers(self) -> bool:
        """True if weights are put together for their products and dropped again."""
        return self.sharded and (self.data > 1 or self.cpu_offload)


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters on one device of a tensor-parallel group; `hidden` ones are in matrices of the layers.

    Of these, `uneven` ones are in matrices whose parts on the devices keep no blocks of 8-bit state. `linear` ones are
    in the frozen matrices that bitsandbytes quantises: those of linear layers, without the LM head. `trained_wide` ones
    are in float32: adapters always, and modules that are trained whole beside them if the model is.
    """

    all: int
    trained: int
    block: int
    trained_block: int
    outside: int
    trained_hidden: int
    trained_uneven: int
    trained_wide: int
    linear: int
    block_linear: int


def count_parameters(
    source: ModelSource, config: ModelConfig, dtype: torch.dtype, lora: LoraOptions | None, devices: Devices
) -> Counts:
    """Count the parameters of one device of a group; a block is the largest layer."""
    config = copy.deepcopy(config)
    layers = config.get_text_config().num_hidden_layers
    split_config(config, devices.tensor)

    parts = devices.data if devices.sharded else 1
    if layers_are_alike(source, config):
        one, two = (_sizes(MetaModel(source, with_layers(config, depth), dtype, lora), parts) for depth in (1, 2))
        every = two.minus(one)
        whole, block, inside = one.plus(every, layers - 1), every, layers * every.all
    else:
        described = MetaModel(source, config, dtype, lora)
        whole, sizes = _sizes(described, parts), _sizes_of_layers(described, parts)
        block, inside = max(sizes, key=lambda size: size.all), sum(size.all for size in sizes)
    # The rows of the vocabulary are divided over the group too.
    table = config.get_text_config().vocab_size * config.get_text_config().hidden_size
    tables = table * (1 if config.tie_word_embeddings else 2) if devices.tensor > 1 else 0
    outside = whole.all - inside - tables + tables // devices.tensor
    trained = whole.trained if lora is not None else outside + inside
    return Counts(
        outside + inside,
        trained,
        block.all,
        block.trained,
        outside,
        whole.trained_hidden,
        whole.trained_uneven,
        whole.trained_wide,
        whole.linear,
        block.linear,
    )


def layers_are_alike(source: ModelSource, config: ModelConfig) -> bool:
    """Return true if a model with fewer layers shows what each layer of `config` takes.

    It does not if layers have weights of different shapes, as in mixtures whose first layers are dense, or share keys
    and values. Layers that are not recognised are taken to be alike.
    """
    return _alike(MetaModel(source, config, torch.float32, None))


@lru_cache(maxsize=64)
def _alike(described: MetaModel) -> bool:
    layers = decoder_layers(described.built)
    if layers is None:
        return True
    shared = getattr(described.built.config.get_text_config(), "num_kv_shared_layers", 0)
    shapes = {tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}
    return not shared and len(shapes) == 1


@dataclass(frozen=True)
class _Sizes:
    """Numbers of parameters: of all, of trained ones (in matrices: all, uneven; wide ones), of frozen linear ones."""

    all: int
    trained: int
    trained_hidden: int
    trained_uneven: int
    trained_wide: int
    linear: int

    def plus(self, other: _Sizes, times: int) -> _Sizes:
        """Return the sum of these numbers and `times` those of `other`."""
        return _Sizes(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def minus(self, other: _Sizes) -> _Sizes:
        """Return the difference of these numbers and those of `other`."""
        return self.plus(other, -1)


@lru_cache(maxsize=64)
def _sizes(described: MetaModel, parts: int) -> _Sizes:
    mark_kinds(described.built)
    return _sizes_of(described.built, described.built.get_output_embeddings(), parts)


@lru_cache(maxsize=64)
def _sizes_of_layers(described: MetaModel, parts: int) -> list[_Sizes]:
    mark_kinds(described.built)
    return [_sizes_of(layer, None, parts) for layer in decoder_layers(described.built) or ()]


def _sizes_of(module: nn.Module, head: nn.Module | None, parts: int) -> _Sizes:
    """Return the numbers of `module`; linear ones are those that bitsandbytes finds: without the LM head."""
    trained = [p for p in module.parameters() if p.requires_grad]
    rest = set(module.modules()) - (set() if head is None else set(head.modules()))
    # No subclass of them: `replace_with_bnb_linear` of transformers.
    linear = (m.weight for m in rest if isinstance(m, nn.Linear | Conv1D) and type(m) in (nn.Linear, Conv1D))
    return _Sizes(
        sum(p.numel() for p in module.parameters()),
        sum(p.numel() for p in trained),
        *count_matrices(trained, parts),
        sum(p.numel() for p in trained if p.dtype == torch.float32),
        sum(weight.numel() for weight in linear if not weight.requires_grad),
    )


def count_matrices(parameters: Iterable[Tensor], parts: int | None = None) -> tuple[int, int]:
    """Return the numbers of `parameters` in matrices between hidden states: of all, and of uneven ones.

    Args:
        parameters: parameters of a model whose tables are marked.
        parts: number of devices that share a matrix. Default: those over which it is split.
    """
    matrices = [p for p in parameters if is_hidden_matrix(p)]
    uneven = (p for p in matrices if not keeps_blocks(p, parts))
    return sum(p.numel() for p in matrices), sum(p.numel() for p in uneven)


def num_weights(parameter: Tensor) -> int:
    """Return the number of weights, which of a quantised parameter is not that of its packed values."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


class MetaModel:
    """A model on the meta device, with its adapters, by what it is built from.

    A plan asks for the same few models again and again. Equal ones are built once, so nobody may change `built`.

    Args:
        source: model, for messages and its attention implementation.
        config: transformers configuration of the model, which nobody changes any more.
        dtype: dtype of the weights.
        lora: options of the adapters, if only adapters are trained.
    """

    def __init__(self, source: ModelSource, config: ModelConfig, dtype: torch.dtype, lora: LoraOptions | None) -> None:
        self._source, self._config, self._dtype, self._lora = source, config, dtype, lora
        self._key: object
        try:
            self._key = pickle.dumps((source, config, dtype, lora))
        except Exception:  # a configuration may hold anything; such a model equals only itself
            self._key = object()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MetaModel) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def built(self) -> Any:
        """The model."""
        return _built(self)

    def _build(self) -> Any:
        with torch.device("meta"):
            model = model_class(self._source, self._config, self._dtype, generates=False)
            if self._lora is not None:
                add_adapters(model, self._lora)
        return model


@lru_cache(maxsize=8)
def _built(described: MetaModel) -> Any:
    return described._build()


def with_layers(config: ModelConfig, layers: int) -> Any:
    """Copy `config`, whose layers are alike, for a model with `layers` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        # Some configurations compute them from other options, and do not let them be set.
        with suppress(AttributeError):
            text.layer_types = text.layer_types[:layers]
    return config


def split_config(config: ModelConfig, size: int) -> None:
    """Change `config` to the smaller model that each of `size` devices computes if they share every layer."""
    if size == 1:
        return
    text = config.get_text_config()
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(text, key, getattr(text, key) // size)
