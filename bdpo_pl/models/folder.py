"""The files of a model's folder: which of them affect the model, and a check that none leads out of the folder.

A folder may come from an untrusted source. Its index and its links are followed only within the folder; in Hugging
Face's own cache also to the blobs of the same repository.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bdpo_pl.errors import InputError

_INDEX_SUFFIX = ".index.json"
_TEMPLATES = "additional_chat_templates"
# Weights of other frameworks, and files for human readers: none of these are loaded.
_UNREAD = frozenset({".md", ".png", ".jpg", ".gif", ".pdf", ".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".gguf"})


def gguf_file(name: str) -> Path | None:
    """Return the path of the GGUF file that a model's name refers to; None if it is not the name of such a file."""
    return Path(name).expanduser() if name.endswith(".gguf") else None


def check_folder(name: str) -> None:
    """Refuse a local model that does not exist, is not a model, or has files that lead out of its folder.

    Args:
        name: a model's folder, its GGUF file, or a name on the hub, which is accepted unchecked.

    Raises:
        InputError: there is no such folder or file; it is a PEFT adapter; a link, or a name in an index, leads out of
            the folder; an entry is not a regular file.
    """
    if (file := gguf_file(name)) is not None:
        if not file.is_file():
            raise InputError(f"no GGUF file at {name!r} (looked from {Path.cwd()})")
        return
    folder = Path(name).expanduser()
    if not folder.is_dir():
        # A path that does not exist should be reported as that, not be searched for on the hub.
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise InputError(f"no model folder at {name!r} (looked from {Path.cwd()})")
        return
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"{name} is a PEFT adapter{_base_of(folder)}, not a whole model; merge it into its base model "
            "(PeftModel.merge_and_unload, then save_pretrained) and give that folder; to train the adapter on, give "
            f"fit --model.policy BASE --model.lora.adapter {name}"
        )
    check_links(folder)
    for path in _entries(folder):
        if path.name.endswith(_INDEX_SUFFIX):
            for file_name in set(weight_map(path).values()):
                check_name(file_name, path)


def check_links(folder: Path) -> None:
    """Raise `InputError` if an entry of `folder` leads out of it or is not a regular file."""
    for path in _entries(folder):
        _check_entry(path, folder)


def weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor from the index at `index`.

    Raises:
        InputError: the file is not a valid index.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): file for tensor, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of weights ({type(error).__name__}); fetch the model again") from None


def check_name(file: object, index: Path) -> None:
    """Raise `InputError` unless `file`, which `index` names, is a plain name within the folder."""
    if not isinstance(file, str) or Path(file).name != file:
        raise InputError(f"{index}: {file!r} is not the name of a file in the folder")


def files_digest(folder: Path) -> str:
    """Return the SHA-256 over names and contents of all files that affect the outputs of the model in `folder`."""
    files = sorted(path for path in _entries(folder) if path.suffix.lower() not in _UNREAD)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(file_digest, files))
    named = [[str(path.relative_to(folder)), digest] for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the files that transformers may read.

    These are all but hidden files and folders; of the folders, only that of chat templates is included.
    """
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.name == _TEMPLATES:
            yield from path.iterdir()


def _check_entry(path: Path, folder: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputError(f"{path} is a link to nothing; copy the file itself into the folder") from None
    root = folder.resolve()
    # Hugging Face's cache: …/models--a--b/snapshots/revision/file links to …/models--a--b/blobs/digest.
    within = root.parents[1] if root.parent.name == "snapshots" else root
    if not target.is_relative_to(within):
        raise InputError(f"{path} leads out of the model's folder, to {target}; copy the file itself into the folder")
    if not target.is_file():
        raise InputError(f"{path} is not a regular file; remove it from the model's folder")


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" of {base}" if base else ""
