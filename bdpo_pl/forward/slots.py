"""Keys and values of several sequences in memory that is allocated once: each sequence has a slot and its own length.

`transformers` concatenates its cache anew at every token, with one length for all rows. Here a token is written to its
place, and a slot whose sequence has ended is given to another one.

Shapes: B slots; N rows of a forward pass; T tokens of a row; P places of a slot; H heads; D size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache


class SlotCache(Cache):
    """A cache of `transformers` in which each sequence has a slot and its own length.

    `aim` says where the next forward pass writes. The rows of a pass are neighbouring slots.

    Args:
        num_slots: number of sequences.
        num_places: maximum number of tokens of a sequence.
    """

    def __init__(self, num_slots: int, num_places: int) -> None:
        super().__init__(layers=[])
        self.num_slots, self.num_places = num_slots, num_places
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def aim(self, first: int, places: Tensor, width: int) -> None:
        """Set where the next forward pass writes.

        Args:
            first: slot of its first row.
            places: (N, T) places of its tokens; padding is written to place P, where nobody looks.
            width: number of places that the pass sees.
        """
        assert first + len(places) <= self.num_slots
        assert width <= self.num_places
        self._first, self._places, self._width = first, places, width
        self._rows = torch.arange(first, first + len(places), device=places.device).unsqueeze(1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (N, H, T, D) new keys and values of a layer, and return the (N, H, width, D) that the pass sees."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = self._empty(key_states), self._empty(value_states)
        last = self._first + len(self._places)
        found = []
        for kept, new in zip(self._layers[layer_idx], (key_states, value_states), strict=True):
            kept[self._rows, :, self._places] = new.transpose(1, 2)
            found.append(kept[self._first : last, :, : self._width])
        return found[0], found[1]

    def spread(self, length: int) -> None:
        """Copy the first `length` places of slot 0 into all slots."""
        for layer in self._layers.values():
            for kept in layer:
                kept[1:, :, :length] = kept[:1, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` places of a slot into another."""
        for layer in self._layers.values():
            for kept in layer:
                kept[target, :, :length] = kept[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Raise an error: each sequence has its own length, so that models must go by the positions they are given."""
        raise NotImplementedError("the sequences in slots have no common length")

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Raise an error: models must use the mask that they are given."""
        raise NotImplementedError("the sequences in slots have no common mask")

    def _empty(self, states: Tensor) -> Tensor:
        # Zeros, because a hidden place counts zero times what stands in it, and memory may hold NaN.
        H, D = states.shape[1], states.shape[3]
        return states.new_zeros(self.num_slots, H, self.num_places + 1, D)
