"""The LoRA forward and backward, fused. peft keeps configuration, initialisation and files.

For projections that read the same input x (q, k, v; gate, up) with frozen weights W_i, adapters
A_i (r x in), B_i (out x r) and one dropout mask M:

    y_i = x W_i' + s (x M / (1 - p)) A_i' B_i'

peft computes each y_i apart: a copy of x in fp32, a mask of its own (5 ns an element on a CPU,
more than the rest of the adapter), a separate sum. Here one autograd function does a whole group:
the base product and the low-rank product accumulate in place, the A_i are one matrix, x is saved
once, dropped out, in the base's precision, of the mask only its bits (off the CPU its seed).

One mask for a group leaves the distribution of each projection's dropout as it is; only the noise
of its members is correlated. `shared_dropout: false` draws one for each member.

What this does not cover stays with peft, and `fuse` returns why: DoRA and other variants, biases,
quantised bases, several adapters at once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch.autograd.function import once_differentiable

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one parent module that read the same input, in every Llama-shaped model."""

_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SOURCE = np.random.SFC64(0)
"""Set to a seed's state for each mask: to make a generator takes as long as to draw the mask."""


@cache
def _patterns(p: float) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Eight decisions at once: a table whose every entry is a pattern of them, each as often as its
    probability says in 2^16 draws, rounded down; and what was rounded off of each, cumulated."""
    kept = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)
    whole, rest = np.divmod((1 - p) ** kept * p ** (8.0 - kept) * 2**16, 1)
    bounds = (np.cumsum(rest)[:-1] / (rest.sum() or 1) * 2.0**64).astype(np.uint64)
    return np.repeat(np.arange(256, dtype=np.uint8), whole.astype(int)), bounds


def kept_bits(seed: int, count: int, p: float) -> torch.Tensor:
    """`count` independent decisions, kept with probability 1 - p: packed, int16, sixteen a word.

    Two random bytes choose the pattern of eight from a table; the few draws beyond its end (a
    six-hundredth at p = 0.1) choose anew from what the table rounds off, so the whole is
    Bernoulli(p) to the letter at a twentieth of the time of torch's bernoulli_ on a CPU.
    """
    table, bounds = _patterns(p)
    # SFC64's own way to start from one number: three times that, a counter of 1, 12 rounds.
    start: Any = {"state": np.array([seed, seed, seed, 1], np.uint64)}
    _SOURCE.state = {"bit_generator": "SFC64", "state": start, "has_uint32": 0, "uinteger": 0}
    random: Any = _SOURCE.random_raw
    draws = random(12 + -(-count // 32))[12:].view(np.uint16)
    bits = table.take(draws, mode="clip")
    beyond = np.flatnonzero(draws >= len(table))
    bits[beyond] = bounds.searchsorted(random(len(beyond)), side="right")
    return torch.from_numpy(bits.view(np.int16))


@cache
def _planes(dtype: torch.dtype) -> torch.Tensor:
    """Shifts that bring each of sixteen bits to the sign's place: shape (16, 1)."""
    return torch.arange(8 * dtype.itemsize - 16, 8 * dtype.itemsize, dtype=dtype)[:, None]


def keep_mask(source: torch.Tensor | int, p: float, like: torch.Tensor) -> torch.Tensor:
    """Dropout mask as integers of `like`'s width and shape: all ones where kept, zero where not.

    And-ing the bits of a tensor with it takes a fifth of a multiplication's time on a CPU.

    Args:
        source: `kept_bits`; off the CPU a seed, from which the device draws the same mask again.
    """
    dtype = _WIDTH[like.element_size()]
    if like.device.type == "meta":  # shapes alone
        return torch.empty_like(like, dtype=dtype)
    if isinstance(source, torch.Tensor):
        signs = source.to(dtype) << _planes(dtype)
        mask = signs.bitwise_right_shift_(8 * dtype.itemsize - 1)
        return mask.view(-1)[: like.numel()].view(like.shape)
    generator = torch.Generator(like.device).manual_seed(source)
    mask = torch.empty(like.shape, dtype=dtype, device=like.device)
    return mask.bernoulli_(1 - p, generator=generator).neg_()


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` where kept, zero where dropped, no scaling; in the place of the mask."""
    return mask.bitwise_and_(values.view(mask.dtype)).view(values.dtype)


class _Fused(torch.autograd.Function):
    """All projections of a group; see the module's docstring for the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: float,
        p: float,
        seeds: tuple[int, ...],
        *matrices: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """x: (tokens, in); matrices: W_1 A_1 B_1 W_2 ...; seeds: none without dropout, one for a
        shared mask, or one a member. Returns y_i: (tokens, out_i)."""
        weights, downs, ups = matrices[::3], matrices[1::3], matrices[2::3]
        sizes = [len(a) for a in downs]
        spans = sizes if len(seeds) > 1 else [sum(sizes)]
        boost = scale / (1 - p) if seeds else scale
        down = (torch.cat(downs) * boost).to(x.dtype)
        rows_up = [b.to(x.dtype).T.contiguous() for b in ups]  # a tenth faster than as they lie
        on_cpu = x.device.type == "cpu"
        masks = [kept_bits(seed, x.numel(), p) if on_cpu else seed for seed in seeds]
        # The backward pass reads x only as the low-rank product did, so that is what is saved.
        inputs = [masked(x, keep_mask(mask, p, x)) for mask in masks] or [x]
        parts = [each @ rows.T for each, rows in zip(inputs, down.split(spans), strict=True)]
        low = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        outputs = [x @ weight.T for weight in weights]
        for output, up, part in zip(outputs, rows_up, low.split(sizes, dim=1), strict=True):
            output.addmm_(part, up)
        bits = [mask for mask in masks if isinstance(mask, torch.Tensor)]
        ctx.save_for_backward(down, low, *inputs, *weights, *rows_up, *bits)
        ctx.facts = p, seeds, sizes, spans, boost, downs[0].dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        p, seeds, sizes, spans, boost, precise = ctx.facts
        down, low, *rest = ctx.saved_tensors
        inputs, rest = rest[: len(spans)], rest[len(spans) :]
        members = len(sizes)
        weights, ups, bits = rest[:members], rest[members : 2 * members], rest[2 * members :]
        masks = bits or seeds  # off the CPU they are drawn again
        parts = low.T.contiguous().split(sizes)
        up_gradients = [(part @ g).T for part, g in zip(parts, gradients, strict=True)]
        low_gradient = torch.cat([g @ up.T for g, up in zip(gradients, ups, strict=True)], dim=1)
        # One pass for a shared mask; one a member (with its own rows of `down`) otherwise.
        spread = low_gradient.split(spans, dim=1)
        downs = [part.T @ each for part, each in zip(spread, inputs, strict=True)]
        back: list[torch.Tensor] = []
        if ctx.needs_input_grad[0]:
            back = [part @ rows for part, rows in zip(spread, down.split(spans), strict=True)]
            for each, source in zip(back, masks, strict=False):  # no masks without dropout
                mask = keep_mask(source, p, each)
                each.view(mask.dtype).bitwise_and_(mask)
        base = sum(back[1:], start=back[0]) if back else None
        if base is not None:
            for gradient, weight in zip(gradients, weights, strict=True):
                base.addmm_(gradient, weight)
        down_gradients = (torch.cat(downs).to(precise) * boost).split(sizes)
        found: list[torch.Tensor | None] = []
        for down_gradient, up_gradient in zip(down_gradients, up_gradients, strict=True):
            found += [None, down_gradient, up_gradient.to(precise)]
        return base, None, None, None, *found


@dataclass
class _Group:
    """Projections that read one input: the first one called computes all, the others collect."""

    members: list[LoraLinear]
    shared_dropout: bool
    _input: torch.Tensor | None = None
    _ready: dict[int, torch.Tensor] = field(default_factory=dict)

    def project(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The output of member `number` for x of shape (..., in)."""
        if self._input is not x or number not in self._ready:
            self._ready = dict(enumerate(self._compute(x)))
            self._input = x
        output = self._ready.pop(number)
        if not self._ready:
            self._input = None
        return output

    def _compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.members[0]
        name = first.active_adapters[0]
        matrices: list[torch.Tensor] = []
        for member in self.members:
            base = member.get_base_layer().weight
            matrices += [base, member.lora_A[name].weight, member.lora_B[name].weight]
        dropout = first.lora_dropout[name]
        p = dropout.p if first.training and isinstance(dropout, torch.nn.Dropout) else 0.0
        count = 0 if p == 0 else 1 if self.shared_dropout else len(self.members)
        # Seeds come from torch's own generator, which checkpoints and recomputation restore.
        seeds = tuple(int(seed) for seed in torch.randint(2**62, (count,)))
        flat = x.reshape(-1, x.shape[-1]).to(matrices[0].dtype)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            outputs = _Fused.apply(flat, first.scaling[name], p, seeds, *matrices)  # type: ignore[no-untyped-call]
        return [output.view(*x.shape[:-1], -1) for output in outputs]


def fuse(model: Any, *, shared_dropout: bool = True) -> Counter[str]:
    """Replace the LoRA arithmetic of a peft model where the fused one applies.

    Args:
        shared_dropout: one mask for projections that read the same input.

    Returns:
        Layers left to peft, by reason; empty when all are fused.
    """
    left: Counter[str] = Counter()
    for parent in model.modules():
        children = {n: c for n, c in parent.named_children() if isinstance(c, LoraLayer)}
        fusable: dict[str, LoraLinear] = {}
        for name, child in children.items():
            reason = why_not(child)
            if reason:
                left[reason] += 1
            else:
                fusable[name] = child
        for names in _grouped(fusable):
            _install([fusable[name] for name in names], shared_dropout)
    return left


def forget(model: Any) -> None:
    """Drop outputs that no member collected, because a forward pass ended half-way: their graph
    holds the activations of every layer before them."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            group: _Group = forward.args[0]
            group._ready, group._input = {}, None


def why_not(layer: LoraLayer) -> str | None:
    """Why a layer's arithmetic is left to peft, or None where the fused one is the same."""
    base = layer.get_base_layer()
    if type(layer) is not LoraLinear or type(base) is not torch.nn.Linear:
        return f"its base is {type(base).__name__}"
    if len(layer.active_adapters) != 1:
        return "several adapters are active"
    name = layer.active_adapters[0]
    if name in layer.lora_variant:
        return f"variant {type(layer.lora_variant[name]).__name__}"
    if base.bias is not None or layer.lora_bias[name]:
        return "it has a bias"
    if base.weight.requires_grad:
        return "its base weight is trained"
    return None


def _grouped(fusable: dict[str, LoraLinear]) -> list[list[str]]:
    """Names that share an input together, everything else alone."""
    groups: list[list[str]] = []
    for names in GROUPS:
        present = [name for name in names if name in fusable]
        name = fusable[present[0]].active_adapters[0] if present else ""
        alike = {(fusable[n].scaling[name], str(fusable[n].lora_dropout[name])) for n in present}
        if len(alike) == 1:
            groups.append(present)
    taken = {name for group in groups for name in group}
    return groups + [[name] for name in fusable if name not in taken]


def _install(members: Sequence[LoraLinear], shared_dropout: bool) -> None:
    group = _Group(list(members), shared_dropout)
    for number, member in enumerate(members):
        member.forward = partial(_forward, group, number, member, member.forward)


def _forward(
    group: _Group,
    number: int,
    member: LoraLinear,
    peft: Any,
    x: torch.Tensor,
    *args: Any,
    **kw: Any,
) -> torch.Tensor:
    """peft's own forward where it has more to do than add the adapter (off, merged, mixed)."""
    if member.disable_adapters or member.merged or args or kw:
        output: torch.Tensor = peft(x, *args, **kw)
        return output
    return group.project(number, x)
