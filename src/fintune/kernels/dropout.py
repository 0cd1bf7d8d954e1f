"""Dropout masks that can be kept for the backward pass: on a CPU as bits, elsewhere as a seed.

torch's bernoulli_ takes 5 ns an element on a CPU, more than the rest of an adapter's forward pass;
`draw_keep_bits` takes a twentieth of it. And-ing a tensor with a mask takes a fifth of the time of
a multiplication.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type as wide as a floating one, by bytes."""
_GENERATOR = np.random.SFC64(0)
"""Seeded anew for each mask: to construct a generator takes as long as to draw a mask."""


@cache
def _patterns(p: float) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Lookup table from 16 random bits to 8 Bernoulli(1 - p) bits.

    Returns:
        Each of the 256 patterns repeated as often as its probability says in 2^16 draws, rounded
        down; and the cumulated probabilities of what was rounded off, in units of 2^-64.
    """
    kept = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)
    whole, rest = np.divmod((1 - p) ** kept * p ** (8.0 - kept) * 2**16, 1)
    bounds = (np.cumsum(rest)[:-1] / (rest.sum() or 1) * 2.0**64).astype(np.uint64)
    return np.repeat(np.arange(256, dtype=np.uint8), whole.astype(int)), bounds


def draw_keep_bits(seed: int, count: int, p: float) -> torch.Tensor:
    """`count` independent Bernoulli(1 - p) bits, packed sixteen to an int16.

    Draws beyond the end of the table (1 in 600 at p = 0.1) choose from the remainders, so the
    distribution is exact.
    """
    table, remainders = _patterns(p)
    # SFC64 seeded with one number as its reference does it: a counter of 1, 12 rounds thrown away.
    start: Any = {"state": np.array([seed, seed, seed, 1], np.uint64)}
    _GENERATOR.state = {"bit_generator": "SFC64", "state": start, "has_uint32": 0, "uinteger": 0}
    random_raw: Any = _GENERATOR.random_raw
    draws = random_raw(12 + -(-count // 32))[12:].view(np.uint16)
    bits = table.take(draws, mode="clip")
    beyond = np.flatnonzero(draws >= len(table))
    bits[beyond] = remainders.searchsorted(random_raw(len(beyond)), side="right")
    return torch.from_numpy(bits.view(np.int16))


@cache
def _shifts(dtype: torch.dtype) -> torch.Tensor:
    """Left shifts that bring each of sixteen bits to the sign bit, shape (16, 1)."""
    return torch.arange(8 * dtype.itemsize - 16, 8 * dtype.itemsize, dtype=dtype)[:, None]


def keep_mask(source: torch.Tensor | int, p: float, like: torch.Tensor) -> torch.Tensor:
    """Dropout mask as integers of the width and shape of `like`: all ones where kept, else zero.

    Args:
        source: bits of `draw_keep_bits`, or off the CPU the seed that the device draws from.
    """
    dtype = _INTEGER[like.element_size()]
    if like.device.type == "meta":  # shapes alone
        return torch.empty_like(like, dtype=dtype)
    if isinstance(source, torch.Tensor):
        signs = source.to(dtype) << _shifts(dtype)
        mask = signs.bitwise_right_shift_(8 * dtype.itemsize - 1)
        return mask.view(-1)[: like.numel()].view(like.shape)
    generator = torch.Generator(like.device).manual_seed(source)
    mask = torch.empty(like.shape, dtype=dtype, device=like.device)
    return mask.bernoulli_(1 - p, generator=generator).neg_()


def apply_mask(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` where kept, zero where dropped, without scaling; written into the mask's memory."""
    return mask.bitwise_and_(values.view(mask.dtype)).view(values.dtype)
