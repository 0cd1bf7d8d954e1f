"""What torch needs on a CPU: threads by what is free, and oneDNN, which is in it, where that is
faster.

*Attention in bf16.* torch's flash kernel computes a bf16 product in fp32, on an AMD processor
without AVX-512: with it attention was 38 % of a training step of SmolLM2, and is 30 % of a step a
fifth shorter here. As flash attention on a GPU does, this multiplies bf16, adds up in fp32, takes
the softmax in fp32 and keeps none of it for the backward pass.

*Linear layers of inference.* In fp32 torch gives them to MKL, which uses AVX-512 on Intel's
processors alone. In bf16 oneDNN compiles each number of rows anew, and here rows come and go.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fintune import console

BUSY_SECONDS = 0.5
"""How long other processes' work is watched before torch's threads are chosen."""
BLOCK = 256
"""Queries at a time; scores are (heads, BLOCK, keys up to the last query)."""
PAD_MULTIPLE = 32
"""Sizes of products are multiples of this: oneDNN compiles each new size, for about 7 ms."""
LEAST_ROWS = 8
"""Below, a product is as fast in MKL."""


def free_threads() -> int:
    """Threads for torch on a CPU: as many as cores are free, unless OMP_NUM_THREADS says. They wait
    for each other a thousand times a step, so one on a busy core holds up all: two beside one busy
    process made a tenth of the tokens of one thread."""
    most, cores = int(torch.get_num_threads()), psutil.cpu_count() or 1
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return most
    times, lower = psutil.cpu_times_percent(BUSY_SECONDS), os.nice(0) <= 0
    idle = times.idle + (getattr(times, "nice", 0.0) if lower else 0.0)  # which gives way
    free = int(idle / 100 * cores + 0.5)
    if free < most:
        console.say(f"{max(1, free)} of {most} threads: other processes work on the cores")
    return max(1, min(most, free))


def set_threads(count: int) -> None:
    """Give torch this many threads; where it has them already, nothing is touched, as torch 2.13
    cannot in a fork of a process of one thread."""
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def padded_size(rows: int) -> int:
    """Rows of a matrix product, rounded up to one of few sizes: oneDNN compiles a kernel for each
    new size (about 7 ms) and caches it (3 MB)."""
    return rows + -rows % (8 if rows <= 64 else 32 if rows <= 1024 else 256)


def speed_up_linear(model: Any) -> None:
    """Pad the inputs of a frozen model's linear layers to few sizes, in inference on a CPU. In fp32
    on AMD alone they also take oneDNN's product, whose order of summation is another one."""
    has = torch.cpu.get_capabilities()
    amd = str(has.get("cpu_name")).startswith("AMD") and bool(has.get("avx512_f"))
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and layer.weight.device.type == "cpu":
            layer.forward = partial(_linear, layer, amd)  # type: ignore[method-assign]


def _linear(layer: torch.nn.Linear, amd: bool, x: torch.Tensor) -> torch.Tensor:
    weight, rows = layer.weight, x.numel() // x.shape[-1]
    half, single = weight.dtype == torch.bfloat16, weight.dtype == torch.float32
    ours = (half or (single and amd)) and rows >= LEAST_ROWS and not torch.is_grad_enabled()
    # A model may have been cast, or moved to another device, since.
    if not ours or x.dtype != weight.dtype or x.device.type != "cpu":
        return F.linear(x, weight, layer.bias)
    flat = F.pad(x.reshape(rows, -1), (0, 0, 0, padded_size(rows) - rows))
    output = (F.linear if half else _onednn)(flat, weight, layer.bias)[:rows]
    return output.view(*x.shape[:-1], -1)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sizes: list[int], scaling: float
) -> torch.Tensor:
    """softmax(scaling Q K') V, each token over itself and earlier ones of its sequence.

    Args:
        query: bf16, shape (heads, tokens, width); key, value: (key_value_heads, tokens, width).
        sizes: tokens of each sequence, in order.

    Returns:
        bf16, shape (tokens, heads, width).
    """
    return _Causal.apply(query, key, value, sizes, scaling)  # type: ignore[no-untyped-call, no-any-return]


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sizes: list[int],
        scaling: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = sizes, scaling
        output = query.new_empty(query.shape[1], len(query), value.shape[-1])
        for span in _sequences(sizes):
            q, k, v = (_padded(each[:, span]) for each in (query, key, value))
            k32 = k.float()
            for part in _blocks(q.shape[1]):
                p = _probabilities(_grouped(q[:, part], k), k32[:, : part.stop], scaling)
                _put(output[span][part], p.to(v.dtype) @ v[:, : part.stop])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = query, key, value = ctx.saved_tensors
        sizes, scaling = ctx.settings
        # Of the strides that the projections' outputs have: no copy follows.
        grads = [x.new_empty(x.shape[1], len(x), x.shape[-1]) for x in inputs]
        grad_output = grad_output.transpose(0, 1)
        for span in _sequences(sizes):
            # Queries of the padding add nothing to a key's gradient: theirs is zero.
            q, k, v, g = (_padded(each[:, span]) for each in (query, key, value, grad_output))
            k32, v32 = k.float(), v.float()
            grad_k, grad_v = torch.zeros_like(k32), torch.zeros_like(v32)
            for part in _blocks(q.shape[1]):
                seen, rows, grad = (
                    slice(part.stop),
                    _grouped(q[:, part], k),
                    _grouped(g[:, part], k),
                )
                p = _probabilities(rows, k32[:, seen], scaling)
                grad_v[:, seen] += p.to(v.dtype).transpose(1, 2) @ grad
                grad_p = _product(grad, v32[:, seen])
                grad_s = torch._softmax_backward_data(grad_p, p, -1, torch.float32).to(q.dtype)
                grad_k[:, seen] += grad_s.transpose(1, 2) @ rows
                _put(grads[0][span][part], (grad_s @ k[:, seen]).mul_(scaling))
            _put(grads[1][span], grad_k.mul_(scaling))
            _put(grads[2][span], grad_v)
        return *(grad.transpose(0, 1) for grad in grads), None, None


def _sequences(sizes: list[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _blocks(tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, BLOCK):
        yield slice(first, min(first + BLOCK, tokens))


def _padded(x: torch.Tensor) -> torch.Tensor:
    """(heads, tokens, width) with zeros up to a multiple of PAD_MULTIPLE tokens, contiguous."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % PAD_MULTIPLE)).contiguous()


def _grouped(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(heads, rows, width) -> (key_value_heads, heads of one key-value head * rows, width)."""
    return x.reshape(len(key), -1, x.shape[-1])


def _put(there: torch.Tensor, rows: torch.Tensor) -> None:
    """A part's rows, grouped or not, without their padding, into (tokens, heads, width)."""
    tokens, heads, width = there.shape
    there.copy_(rows.reshape(heads, -1, width).transpose(0, 1)[:tokens])


def _probabilities(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """fp32 softmax of one block's scores: its queries are the last tokens of `key`."""
    scores, keys = _product(query, key).mul_(scaling), key.shape[1]
    rows = keys % BLOCK or BLOCK
    scores.view(len(key), -1, rows, keys)[..., keys - rows :].add_(_causal_mask(rows))
    return scores.softmax(dim=-1)


@cache
def _causal_mask(rows: int) -> torch.Tensor:
    return torch.full((rows, rows), float("-inf")).triu_(1)


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """one @ other' of bf16 values, in fp32: oneDNN rounds only its inputs, which loses nothing."""
    with _bf16_inputs():
        return one.float() @ other.transpose(1, 2)


@contextmanager
def _bf16_inputs() -> Iterator[None]:
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
