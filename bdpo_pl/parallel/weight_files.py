"""Parts of a model's weights, read from its safetensors files without reading the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.folder import check_folder, check_name, gguf_file, weight_map
from bdpo_pl.models.loading import ModelSource

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def check_parts(name: str) -> None:
    """Raise `InputError` if the model `name` is a GGUF file, of which no part can be read alone."""
    if gguf_file(name) is not None:
        raise InputError(
            f"{name} is a GGUF file, which cannot be read in parts; train it with ddp or on one device, or "
            "load it with transformers, save it with save_pretrained, and name that folder"
        )


class WeightFiles:
    """The tensors of a model folder, as a context manager that holds the files open.

    Args:
        folder: folder with `model.safetensors`, or with several files and their index.
        name: name of the model, for messages.

    Raises:
        InputError: there are no such files, the index names a file outside the folder, or a file is damaged.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._open: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        self._stored: dict[str, str] = {}
        self._joined: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        self._last: tuple[str, Tensor] | None = None
        if (index := folder / _INDEX).is_file():
            for tensor, file in weight_map(index).items():
                check_name(file, index)
                self._files[tensor] = folder / file
        elif (single := folder / _SINGLE).is_file():
            self._files = dict.fromkeys(self._file(single).keys(), single)
        else:
            raise InputError(
                f"{name} has neither {_SINGLE} nor {_INDEX}: sharded loading reads safetensors files; "
                "save the model again with save_pretrained"
            )

    @classmethod
    def of(cls, source: ModelSource) -> WeightFiles:
        """Return the files of `source`, fetched first if it is on the hub.

        Raises:
            InputError: the folder has no valid files, or the hub cannot be reached.
        """
        check_folder(source.name)
        check_parts(source.name)
        folder = Path(source.name).expanduser()
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                fetched = snapshot_download(
                    source.name, revision=source.revision, allow_patterns=["*.safetensors", _INDEX]
                )
            except Exception as error:  # the hub client raises many kinds; each means that the files are missing
                raise InputError(f"cannot fetch the weights of {source.name!r}: {error}") from error
            folder = Path(fetched)
        return cls(folder, source.name)

    def take_names_of(self, model: CausalLM) -> None:
        """Map the names of `model`'s tensors to the stored ones.

        transformers renames or joins some tensors on loading: files of vision-language models may have older names, and
        files of mixtures of experts one tensor for each expert.

        Args:
            model: model whose names are used; it may be on the meta device.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = model.state_dict()
        for stored in sorted(self._files, key=dot_natural_key):
            if stored in state:
                continue
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
            if pattern is None:
                self._stored.setdefault(name, stored)
            else:
                self._joined.setdefault(name, (by_pattern[pattern], []))[1].append((stored, pattern))

    def read(self, names: list[str], shape: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
        """Read the `part` of the tensor that the files store under one of `names`.

        Raises:
            InputError: the files do not have it, it has another shape, or its file is damaged.
        """
        if (joined := next((name for name in names if name in self._joined), None)) is not None:
            tensor = self._join(joined)
            self._check_shape(joined, tuple(tensor.shape), shape, self._joined[joined][1][0][0])
            return tensor[part] if shape else tensor
        candidates = [found for name in names for found in (name, self._stored.get(name)) if found in self._files]
        if not candidates:
            raise InputError(
                f"{self.name}: its files lack the weight {names[0]}; is the model whole, and saved by transformers?"
            )
        found = candidates[0]
        stored = self._file(self._files[found]).get_slice(found)
        self._check_shape(found, tuple(stored.get_shape()), shape, found)
        return stored[part] if shape else stored[...]

    def stored_dtype(self, names: list[str]) -> torch.dtype | None:
        """Return the dtype of the tensor stored under one of `names`; None if it is put together, or not stored."""
        if any(name in self._joined for name in names):
            return None
        found = [stored for name in names for stored in (name, self._stored.get(name)) if stored in self._files]
        return _DTYPES.get(self._file(self._files[found[0]]).get_slice(found[0]).get_dtype()) if found else None

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...], stored: str) -> None:
        if found != expected:
            raise InputError(
                f"{self.name}: the weight {name} has shape {found} in {self._files[stored].name}, "
                f"and {expected} by the configuration"
            )

    def _join(self, name: str) -> Tensor:
        """Put together a tensor that is stored in several.

        The last one is kept, because its parts are read one by one.
        """
        if self._last is None or self._last[0] != name:
            original, parts = self._joined[name]
            converter = copy.deepcopy(original)
            for stored, pattern in parts:
                converter.add_tensor(name, stored, pattern, self._file(self._files[stored]).get_tensor(stored))
            self._last = name, converter.convert(name)[name]
        return self._last[1]

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._last = None

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None
        return self._open[path]
