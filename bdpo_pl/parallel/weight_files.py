"""Parts of a model's weights, read from its safetensors files without the rest."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.models.folder import check_folder, check_name, weight_map
from bdpo_pl.models.loading import ModelSource

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class WeightFiles:
    """The tensors of a model folder. A context manager: it holds the files open.

    Args:
        folder: with `model.safetensors`, or several files and their index.
        name: of the model, for messages.

    Raises:
        InputError: there are no such files, the index names one outside the folder, or one is damaged.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._open: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        if (index := folder / _INDEX).is_file():
            for tensor, file in weight_map(index).items():
                check_name(file, index)
                self._files[tensor] = folder / file
        elif (single := folder / _SINGLE).is_file():
            self._files = dict.fromkeys(self._file(single).keys(), single)
        else:
            raise InputError(
                f"{name} has neither {_SINGLE} nor {_INDEX}: sharded loading reads safetensors files; "
                "save the model anew with save_pretrained"
            )

    @classmethod
    def of(cls, source: ModelSource) -> WeightFiles:
        """The files of `source`, fetched first if it is on the hub.

        Raises:
            InputError: as the class, or the hub cannot be reached.
        """
        check_folder(source.name)
        folder = Path(source.name).expanduser()
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                fetched = snapshot_download(
                    source.name, revision=source.revision, allow_patterns=["*.safetensors", _INDEX]
                )
            except Exception as error:  # the hub client raises many kinds; each means that the files are not here
                raise InputError(f"cannot fetch the weights of {source.name!r}: {error}") from error
            folder = Path(fetched)
        return cls(folder, source.name)

    def read(self, names: list[str], shape: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
        """The `part` of the tensor that the files have under one of `names`.

        Raises:
            InputError: they have none, it has another shape, or its file is damaged.
        """
        found = next((name for name in names if name in self._files), None)
        if found is None:
            raise InputError(
                f"{self.name}: its files lack the weight {names[0]}; is the model whole, and saved by transformers?"
            )
        stored = self._file(self._files[found]).get_slice(found)
        if tuple(stored.get_shape()) != shape:
            raise InputError(
                f"{self.name}: the weight {found} has shape {tuple(stored.get_shape())} in {self._files[found].name}, "
                f"and {shape} by the configuration"
            )
        return stored[part] if shape else stored[...]

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None
        return self._open[path]
