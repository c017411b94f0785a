"""A cache of scores on disk: chunks of consecutive pairs, each a safetensors file with its key and a checksum.

The folder is named by a digest of everything that the scores depend on, so old scores are never used for a changed
model, data set or option. A chunk is written to a temporary file and then renamed, so an interrupted run leaves only
complete chunks, and the next run continues from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bdpo_pl.errors import InputError
from bdpo_pl.files import write_whole
from bdpo_pl.scoring.scores import ScoreTable

_PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Pauses before a process looks again for chunks that others have written."""


def default_cache_dir() -> Path:
    """Return `$BDPO_PL_CACHE` if it is set, else `bdpo_pl` in the user's cache folder."""
    if named := os.environ.get("BDPO_PL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "bdpo_pl"


class ScoreCache:
    """The chunks of the scores of one table under one key.

    Args:
        root: folder that holds the caches of all keys.
        key: everything that the scores depend on, as plain JSON values; `Reference` in `reference.py` collects it.
        num_pairs: number of pairs in the table.
        chunk_pairs: number of pairs in a chunk.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, root: Path, key: dict[str, Any], num_pairs: int, chunk_pairs: int) -> None:
        self.key = {**key, "num_pairs": num_pairs, "chunk_pairs": chunk_pairs}
        self.digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.num_pairs = num_pairs
        self.chunk_pairs = chunk_pairs
        self.folder = root / "scores" / self.digest[:20]
        # Written before hours of scoring, so that a folder without write permission is found at once.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "key.json", json.dumps(self.key, indent=2, sort_keys=True), shared=True)
        except OSError as error:
            raise InputError(
                f"the score cache {self.folder} cannot be written ({error.strerror}); "
                "set model.scoring.cache_dir or $BDPO_PL_CACHE to a folder that can"
            ) from None

    @property
    def num_chunks(self) -> int:
        """Number of chunks in a complete cache."""
        return -(-self.num_pairs // self.chunk_pairs)

    def indices(self, chunk: int) -> np.ndarray:
        """Return the table indices of the pairs in `chunk`."""
        return np.arange(chunk * self.chunk_pairs, min((chunk + 1) * self.chunk_pairs, self.num_pairs))

    def load(self, chunk: int) -> ScoreTable | None:
        """Return the scores of `chunk`; None if they are missing, or (with a warning) if the file is damaged."""
        path = self._path(chunk)
        if not path.exists():
            return None
        try:
            return self._read(path, chunk)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            warnings.warn(f"score cache: {path} is not used and will be scored again: {error}", stacklevel=2)
            return None

    def load_late(self, chunks: Sequence[ScoreTable | None]) -> list[ScoreTable | None]:
        """Return `chunks`, with those that other processes have just written and this machine did not find yet.

        A client of NFS remembers for up to a minute that a file was not there, unless it changes the folder, as by the
        temporary file here.
        """
        found = list(chunks)
        for pause in _PAUSES_S:
            if all(scores is not None for scores in found):
                break
            with suppress(OSError), tempfile.NamedTemporaryFile(dir=self.folder):
                pass
            time.sleep(pause)
            found = [self.load(number) if scores is None else scores for number, scores in enumerate(found)]
        return found

    def save(self, chunk: int, scores: ScoreTable) -> None:
        """Write the scores of `chunk`, completely or not at all."""
        arrays = {"pair_index": self.indices(chunk), **scores.columns()}
        # One entry, because safetensors writes several in no fixed order, and the same chunk should give the same file.
        proof = json.dumps({"key": self.digest, "checksum": _checksum(arrays)})
        write_whole(self._path(chunk), save(arrays, metadata={"bdpo_pl": proof}), shared=True)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:06d}.safetensors"

    def _read(self, path: Path, chunk: int) -> ScoreTable:
        with safe_open(path, framework="numpy") as file:
            proof = json.loads((file.metadata() or {})["bdpo_pl"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if proof["key"] != self.digest:
            raise ValueError("it was written for another model, data set or option")
        if proof["checksum"] != _checksum(arrays):
            raise ValueError("its contents do not match its checksum")
        if not np.array_equal(arrays.pop("pair_index"), self.indices(chunk)):
            raise ValueError("its rows do not match its file name")
        return ScoreTable(**arrays)


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
