"""Tokenised pairs of a split in a few flat arrays: compact, and shared by data workers without copies."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bdpo_pl.data.tokenization import Ids, PreferencePair

_DIGEST_SIZE = 16


@dataclass(frozen=True)
class PairTable:
    """M preference pairs; pair i is `tokens[starts[i]:starts[i + 1]]`, laid out as [prompt | chosen | rejected].

    Attributes:
        tokens: (total,) int32 token ids.
        starts: (M + 1,) int64, start of each pair in `tokens`, and the total.
        prompt_lengths: (M,) int32, number of tokens in each prompt.
        chosen_lengths: (M,) int32, number of tokens in each chosen response.
        rejected_lengths: (M,) int32, number of tokens in each rejected response.
        null_prompt_ids: token ids of the null prompt x₀ against which comprehension is measured; of several, of the
            first pair's.
        places: file and row of each pair, for messages.
        categories: label of each pair, "" without one.
        safe: (2, M) bool, safety of the chosen and of the rejected responses; None unless all are labelled.
        trained: (total,) bool, true for response tokens that are trained on (unused in prompts); None: all are.
        weights: (M,) float32, factor of each pair's loss; None: all are 1.
        desirable: (M,) bool, whether each single answer is good; None for pairs.
        whole_prompts: (M, 16) uint8, digest of each prompt before truncation; None: no prompt was cut.
        own_null_prompts: token ids of each pair's null prompt; None: all have `null_prompt_ids`.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    chosen_lengths: np.ndarray
    rejected_lengths: np.ndarray
    null_prompt_ids: Ids
    places: list[str]
    categories: list[str]
    safe: np.ndarray | None = None
    trained: np.ndarray | None = None
    weights: np.ndarray | None = None
    desirable: np.ndarray | None = None
    whole_prompts: np.ndarray | None = None
    own_null_prompts: list[Ids] | None = None

    @classmethod
    def from_pairs(
        cls,
        pairs: Iterable[PreferencePair],
        null_prompt_ids: Ids,
        places: Sequence[str] | None = None,
        categories: Sequence[str] | None = None,
        safe: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> PairTable:
        """Pack `pairs` consecutively; `places` and `categories` default to the index and to no label."""
        tokens, lengths, trained = array("i"), array("i"), bytearray()
        is_masked = False
        for p in pairs:
            sides = ((p.prompt_ids, None), (p.chosen_ids, p.chosen_trained), (p.rejected_ids, p.rejected_trained))
            for ids, flags in sides:
                tokens.extend(ids)
                lengths.append(len(ids))
                is_masked |= flags is not None
                trained.extend(flags if flags is not None else b"\1" * len(ids))
        size = np.frombuffer(lengths, dtype=np.int32).reshape(-1, 3) if lengths else np.zeros((0, 3), dtype=np.int32)
        starts = np.zeros(len(size) + 1, dtype=np.int64)
        np.cumsum(size.sum(axis=1), out=starts[1:])
        prompt_lengths, chosen_lengths, rejected_lengths = size.T.copy()
        return cls(
            np.frombuffer(tokens, dtype=np.int32).copy() if tokens else np.zeros(0, dtype=np.int32),
            starts,
            prompt_lengths,
            chosen_lengths,
            rejected_lengths,
            null_prompt_ids=list(null_prompt_ids),
            places=list(places) if places is not None else [f"pair {i}" for i in range(len(size))],
            categories=list(categories) if categories is not None else [""] * len(size),
            safe=safe,
            trained=np.frombuffer(trained, dtype=bool).copy() if is_masked else None,
            weights=weights,
        )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> PreferencePair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of a table of {len(self)}")
        ids = self.tokens[self.starts[index] : self.starts[index + 1]].tolist()
        prompt_end = int(self.prompt_lengths[index])
        chosen_end = prompt_end + int(self.chosen_lengths[index])
        pair = PreferencePair(ids[:prompt_end], ids[prompt_end:chosen_end], ids[chosen_end:])
        if self.trained is None:
            return pair
        trained = self.trained[self.starts[index] : self.starts[index + 1]].tolist()
        chosen, rejected = tuple(trained[prompt_end:chosen_end]), tuple(trained[chosen_end:])
        return replace(
            pair,
            chosen_trained=None if all(chosen) else chosen,
            rejected_trained=None if all(rejected) else rejected,
        )

    @cached_property
    def trained_lengths(self) -> np.ndarray:
        """Numbers of trained tokens in the chosen and rejected responses, (2, M) int32: |y| of the losses."""
        lengths = np.stack([self.chosen_lengths, self.rejected_lengths])
        if self.trained is None:
            return lengths
        total = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        cuts = self.starts[:-1] + self.prompt_lengths
        middles = cuts + self.chosen_lengths
        return np.stack([total[middles] - total[cuts], total[self.starts[1:]] - total[middles]]).astype(np.int32)

    def select(self, indices: np.ndarray) -> PairTable:
        """Return the table of the pairs at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        sizes = self.starts[indices + 1] - self.starts[indices]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        # Position of each token: where its pair begins, and its place in the pair.
        taken = np.arange(starts[-1]) + np.repeat(self.starts[indices] - starts[:-1], sizes)
        trained = None if self.trained is None else self.trained[taken]
        return PairTable(
            self.tokens[taken],
            starts,
            self.prompt_lengths[indices],
            self.chosen_lengths[indices],
            self.rejected_lengths[indices],
            self.null_prompt_ids,
            [self.places[i] for i in indices.tolist()],
            [self.categories[i] for i in indices.tolist()],
            None if self.safe is None else self.safe[:, indices],
            None if trained is None or trained.all() else trained,
            None if self.weights is None else self.weights[indices],
            None if self.desirable is None else self.desirable[indices],
            None if self.whole_prompts is None else self.whole_prompts[indices],
        ).with_null_prompts([self.own_null_prompts[i] for i in indices.tolist()] if self.own_null_prompts else [])

    @classmethod
    def concatenate(cls, tables: Sequence[PairTable]) -> PairTable:
        """Return the pairs of all `tables`, one after the other."""
        starts = np.concatenate([[0], *(np.diff(table.starts) for table in tables)]).cumsum()
        safe = [table.safe for table in tables if table.safe is not None]
        labels = [table.desirable for table in tables if table.desirable is not None]
        trained = [
            np.ones(len(table.tokens), dtype=bool) if table.trained is None else table.trained for table in tables
        ]
        return cls(
            np.concatenate([table.tokens for table in tables]),
            starts.astype(np.int64),
            np.concatenate([table.prompt_lengths for table in tables]),
            np.concatenate([table.chosen_lengths for table in tables]),
            np.concatenate([table.rejected_lengths for table in tables]),
            tables[0].null_prompt_ids,
            [place for table in tables for place in table.places],
            [category for table in tables for category in table.categories],
            np.concatenate(safe, axis=1) if len(safe) == len(tables) else None,
            None if all(table.trained is None for table in tables) else np.concatenate(trained),
            _joined_weights(tables),
            np.concatenate(labels) if len(labels) == len(tables) else None,
            _joined_whole_prompts(tables),
        ).with_null_prompts(_joined_null_prompts(tables))

    @property
    def largest_id(self) -> int:
        """Largest token id in the pairs and the null prompts."""
        return max([int(self.tokens.max(initial=0)), *(token for ids in self.null_prompts for token in ids)])

    @property
    def null_prompts(self) -> list[Ids]:
        """Token ids of each different null prompt."""
        if self.own_null_prompts is None:
            return [self.null_prompt_ids]
        return list(map(list, dict.fromkeys(map(tuple, self.own_null_prompts))))

    def null_prompt_of(self, index: int) -> Ids:
        """Return the token ids of the null prompt of the pair at `index`."""
        return self.null_prompt_ids if self.own_null_prompts is None else self.own_null_prompts[index]

    def with_null_prompts(self, of_pairs: list[Ids]) -> PairTable:
        """Return the table with the null prompt of each pair; of no pair: itself."""
        if not of_pairs:
            return self
        first = of_pairs[0]
        own = None if all(ids == first for ids in of_pairs) else of_pairs
        return replace(self, null_prompt_ids=first, own_null_prompts=own)

    def num_tokens(self, shared: bool) -> np.ndarray:
        """Return each pair's tokens in a batch, (M,); the prompt counts once if `shared`, else once per response."""
        prompts = self.prompt_lengths if shared else 2 * self.prompt_lengths
        return (prompts + self.chosen_lengths + self.rejected_lengths).astype(np.int64)

    def with_whole_prompts(self, cut: Mapping[int, bytes]) -> PairTable:
        """Return the table with the `prompt_digest` of each prompt that was cut, by the index of its pair."""
        if not cut:
            return self
        digests = self.prompt_digests()
        for index, digest in cut.items():
            digests[index] = digest
        return replace(self, whole_prompts=_rows_of(digests))

    def prompt_keys(self) -> list[tuple[bytes, ...]]:
        """Return digests of each pair's prompt, as it is read and as it was before truncation.

        What truncation leaves of a prompt depends on the responses. Two pairs have a prompt in common if they have a
        digest in common.
        """
        read = self.prompt_digests()
        if self.whole_prompts is None:
            return [(digest,) for digest in read]
        return [(digest, whole.tobytes()) for digest, whole in zip(read, self.whole_prompts, strict=True)]

    def prompt_digests(self) -> list[bytes]:
        """Return a digest of each pair's prompt tokens, as they are read: equal digests mean equal prompts."""
        ends = self.starts[:-1] + self.prompt_lengths
        tokens = _bytes_of(self.tokens)
        return [_digest(tokens[4 * a : 4 * b]) for a, b in zip(self.starts[:-1].tolist(), ends.tolist(), strict=True)]

    def response_digests(self) -> tuple[list[bytes], list[bytes]]:
        """Return a digest of each pair's chosen tokens, and one of its rejected tokens."""
        middles = self.starts[:-1] + self.prompt_lengths
        cuts = middles + self.chosen_lengths
        return self._digests(middles, cuts), self._digests(cuts, self.starts[1:])

    def pair_digests(self) -> list[bytes]:
        """Return a digest of each whole pair with its boundaries; of a single answer, of prompt, answer and label.

        The answer to another prompt that stands beside a single answer is chance. An answer that is labelled good once
        and bad once is no repetition, but a contradiction.
        """
        ends, second = self.starts[1:], self.chosen_lengths
        if self.desirable is not None:
            ends, second = self.starts[:-1] + self.prompt_lengths + self.chosen_lengths, self.desirable
        more = np.stack([self.prompt_lengths, second], axis=1).astype(np.int32)
        return self._digests(self.starts[:-1], ends, _bytes_of(more))

    def _digests(self, starts: np.ndarray, stops: np.ndarray, more: memoryview | None = None) -> list[bytes]:
        """Return a digest of each range of tokens, with the corresponding 8 bytes of `more`.

        The trained flags belong to it where not all are true, so that the digest is the same in every table.
        """
        tokens, trained, masked = _bytes_of(self.tokens), None, None
        if self.trained is not None:
            total = np.concatenate([[0], np.cumsum(~self.trained, dtype=np.int64)])
            trained, masked = _bytes_of(self.trained), (total[stops] > total[starts]).tolist()
        found = []
        for i, (a, b) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            parts = [tokens[4 * a : 4 * b]]
            if more is not None:
                parts.append(more[8 * i : 8 * i + 8])
            if trained is not None and masked is not None and masked[i]:
                # Marked, because flags could otherwise be read as further tokens.
                found.append(_digest(*parts, trained[a:b], person=b"trained"))
            else:
                found.append(_digest(*parts))
        return found

    def labels_differ(self, index: int, other: PairTable, at: int) -> bool:
        """Return true if a pair has another weight than the pair `at` of `other`, or safety, where both have labels."""
        here, there = (
            1.0 if table.weights is None else float(table.weights[i]) for table, i in ((self, index), (other, at))
        )
        if here != there:
            return True
        if self.safe is None or other.safe is None:
            return False
        return bool((self.safe[:, index] != other.safe[:, at]).any())

    def content_digest(self) -> str:
        """Return the SHA-256 of all that a model would read: token ids, boundaries and null prompts."""
        digest = hashlib.sha256()
        for part in (
            self.tokens,
            self.prompt_lengths,
            self.chosen_lengths,
            self.rejected_lengths,
            np.array(self.null_prompt_ids, dtype=np.int32),
            *(() if self.trained is None else (self.trained,)),
            *(np.array(ids, dtype=np.int32) for ids in self.own_null_prompts or ()),
        ):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def prompt_digest(ids: Ids) -> bytes:
    """Return the digest that a prompt of these token ids has in a table."""
    return _digest(_bytes_of(np.array(ids, dtype=np.int32)))


def _joined_weights(tables: Sequence[PairTable]) -> np.ndarray | None:
    """Return the weights of the pairs of all `tables`, 1 in a table without; None if there are no others."""
    if all(table.weights is None for table in tables):
        return None
    return np.concatenate(
        [np.ones(len(table), dtype=np.float32) if table.weights is None else table.weights for table in tables]
    )


def _joined_null_prompts(tables: Sequence[PairTable]) -> list[Ids]:
    """Return the null prompt of each pair of all `tables`; none if that of the first table is that of all pairs."""
    first = tables[0].null_prompt_ids
    if all(table.own_null_prompts is None and table.null_prompt_ids == first for table in tables):
        return []
    return [table.null_prompt_of(i) for table in tables for i in range(len(table))]


def _joined_whole_prompts(tables: Sequence[PairTable]) -> np.ndarray | None:
    """Return the digests of the whole prompts of all `tables`; None if no prompt was cut."""
    if all(table.whole_prompts is None for table in tables):
        return None
    return np.concatenate(
        [_rows_of(table.prompt_digests()) if table.whole_prompts is None else table.whole_prompts for table in tables]
    )


def _rows_of(digests: Sequence[bytes]) -> np.ndarray:
    """Return digests as (M, 16) uint8."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST_SIZE)


def _bytes_of(array: np.ndarray) -> memoryview:
    """Return the bytes of `array` as a view, so that slices are not copied."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _digest(first: memoryview, *parts: memoryview, person: bytes = b"") -> bytes:
    digest = hashlib.blake2b(first, digest_size=_DIGEST_SIZE, person=person)
    for part in parts:
        digest.update(part)
    return digest.digest()
