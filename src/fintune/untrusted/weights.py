"""Weights as the header and the bits of a safetensors file, without torch."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from fintune.untrusted.files import (
    ADAPTER,
    LIMITS,
    Check,
    Unreadable,
    open_file,
    read_object,
    some,
    unique,
)

INDEX = "model.safetensors.index.json"
_HEADER = 100_000_000
"""Bytes of a safetensors header, the format's own bound."""
_EXPONENTS = {"F64": (8, 52, 11), "F32": (4, 23, 8), "F16": (2, 10, 5), "BF16": (2, 7, 8)}
"""Floating types of an adapter: bytes, bits of the mantissa, bits of the exponent."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header; `begin` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))


def read_header(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name: known types, sizes that fit, no gap, no overlap.

    Raises:
        Unreadable: with what is wrong.
    """
    try:
        with open_file(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER, size - 8):
                raise ValueError("its header is cut or too long")
            tree = json.loads(file.read(length), object_pairs_hook=unique)
        tree.pop("__metadata__", None)
        tensors = {key: _tensor(value, 8 + length) for key, value in tree.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{name} is not readable safetensors ({str(error)[:100]})") from None
    at = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != at:
            raise Unreadable(f"{name} is not readable safetensors (a gap or overlap at byte {at})")
        at = tensor.end
    if at != size:
        raise Unreadable(f"{name} is cut: {size:,} bytes where its header names {at:,}")
    return tensors


def check_weights(folder: Path) -> Iterator[Check]:
    """Finite, non-empty LoRA tensors whose B matrices are not all zero; read without torch."""
    try:
        tensors = read_header(folder, ADAPTER)
        with open_file(folder, ADAPTER) as file:
            found = {name: _bits(file, tensor) for name, tensor in tensors.items()}
    except Unreadable as error:
        yield Check("weights", "failed", str(error))
        return
    lora_b = [name for name in found if "lora_B" in name]
    empty = [name for name, tensor in tensors.items() if tensor.count == 0]
    infinite = [name for name, (finite, _) in found.items() if not finite]
    zero = [name for name in lora_b if not found[name][1]]
    if not lora_b or empty:
        yield Check("weights", "failed", f"empty: {some(empty) or 'no LoRA tensors'}")
    elif infinite:
        yield Check("weights", "failed", f"NaN or infinite: {some(infinite)}")
    elif len(zero) == len(lora_b):
        yield Check("weights", "failed", "every B matrix is zero: the adapter changes nothing")
    else:
        parameters = sum(tensor.count for tensor in tensors.values())
        yield Check("weights", "ok", f"{len(tensors)} finite tensors, {parameters:,} parameters")
        if zero:
            yield Check("weights", "note", f"{len(zero)} of {len(lora_b)} B matrices are zero")


def check_base_weights(folder: Path) -> Iterator[Check]:
    """Headers of the weights; their bytes are read once, by torch."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    try:
        index = read_object(folder, INDEX) if (folder / INDEX).exists() else {}
        shards = dict(index.get("weight_map") or {}).values()
        if elsewhere := sorted({str(shard) for shard in shards if shard not in names}):
            raise Unreadable(f"{INDEX} names {some(elsewhere)}, which {folder.name} does not hold")
        counts = [len(read_header(folder, name)) for name in names]
    except (Unreadable, ValueError, TypeError) as error:
        yield Check("weights", "failed", str(error))
        return
    if names:
        yield Check("weights", "ok", f"{sum(counts)} tensors in {len(names)} files")


def _tensor(value: Any, start: int) -> Tensor:
    begin, end = value["data_offsets"]
    tensor = Tensor(value["dtype"], tuple(value["shape"]), start + begin, start + end)
    if tensor.dtype not in LIMITS["dtypes"]:
        raise ValueError(f"unknown type {tensor.dtype!r}")
    sizes = (*tensor.shape, begin, end)
    if len(sizes) > 10 or any(type(n) is not int or not 0 <= n < 2**48 for n in sizes):
        raise ValueError("a size that no tensor has")
    if tensor.count * LIMITS["dtypes"][tensor.dtype] != end - begin:
        raise ValueError("a tensor's bytes do not fit its shape")
    return tensor


def _bits(file: BufferedReader, tensor: Tensor) -> tuple[bool, bool]:
    """Whether every element is finite, and whether any is not zero."""
    if tensor.dtype not in _EXPONENTS:
        raise Unreadable(f"{ADAPTER} holds {tensor.dtype}, which no adapter is trained in")
    size, mantissa, exponent = _EXPONENTS[tensor.dtype]
    mask = np.array(((1 << exponent) - 1) << mantissa, dtype=f"<u{size}")
    finite, any_set, left = True, False, tensor.end - tensor.begin
    file.seek(tensor.begin)
    while left:
        data = file.read(min(left, 2**24))
        if len(data) % size or not data:
            raise Unreadable(f"{ADAPTER} was cut while it was read")
        bits = np.frombuffer(data, dtype=mask.dtype)
        left -= bits.nbytes
        finite = finite and not bool(((bits & mask) == mask).any())
        any_set = any_set or bool((bits << np.array(1, mask.dtype)).any())
    return finite, any_set
