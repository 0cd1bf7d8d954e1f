"""Keys and values of a batch whose rows come and go: views of buffers that grow in place."""

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer

CACHE_GROWTH = 64
"""Tokens by which a layer's buffer grows: one copy every 64 tokens instead of each."""


def growing_cache() -> Cache:
    """An empty cache of such layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """DynamicLayer whose keys and values are views of buffers with space for more tokens."""

    _buffers: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, new, size] behind what is there; return views of everything."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            space = (0, 0, 0, end + CACHE_GROWTH - start)
            self._buffers = [pad(self.keys, space), pad(self.values, space)]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def repeated(self, rows: int) -> "GrowingLayer":
        """As many rows of the one that this is; the memory is shared until tokens are added."""
        layer: GrowingLayer = copy(self)
        layer.keys, layer.values = (t.expand(rows, -1, -1, -1) for t in (self.keys, self.values))
        layer._buffers = None
        return layer

    def picked(self, rows: list[int]) -> "GrowingLayer":
        """A copy of these rows, each as often as it is named."""
        layer: GrowingLayer = copy(self)
        layer.keys, layer.values, layer._buffers = self.keys[rows], self.values[rows], None
        return layer

    def cut(self, lengths: list[int]) -> None:
        """Make rows of the one that this is: of so many tokens, padded on the left."""
        keys, values = (whole[:, :, : sum(lengths)] for whole in (self.keys, self.values))
        self._fill(keys.split(lengths, 2), values.split(lengths, 2), max(lengths))

    def join(self, others: Iterable[DynamicLayer], width: int) -> None:
        """Append other layers' rows; all rows are padded on the left to `width` tokens."""
        every = [self, *others]
        self._fill([each.keys for each in every], [each.values for each in every], width)
        for each in every[1:]:  # they give their memory back, layer by layer
            each.keys = each.values = each._buffers = None

    def _fill(self, keys: Sequence[Tensor], values: Sequence[Tensor], width: int) -> None:
        self._buffers = [_joined(keys, width), _joined(values, width)]
        self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)

    def select(self, stay: int, moved: Tensor, first: int) -> None:
        """Keep rows, in place, and of them the tokens from column `first` on.

        Args:
            stay: so many of the first rows.
            moved: the others that are kept, in increasing order.
        """
        end = stay + len(moved)
        for whole in (self.keys, self.values) if len(moved) else ():
            whole[stay:end] = whole[moved]
        kept = slice(end), slice(None), slice(first, None)
        self.keys, self.values = self.keys[kept], self.values[kept]
        if self._buffers is not None:
            self._buffers = [buffer[kept] for buffer in self._buffers]


def _joined(parts: Sequence[Tensor], width: int) -> Tensor:
    """Rows of [rows, heads, tokens, size], padded on the left to `width`, with space for more."""
    sizes, (_, heads, _, size) = list(map(len, parts)), parts[0].shape
    whole = parts[0].new_zeros(sum(sizes), heads, width + CACHE_GROWTH, size)
    for part, place in zip(parts, whole.split(sizes), strict=True):
        place[:, :, width - part.shape[2] : width] = part
    return whole
