"""The LoRA forward and backward, fused. peft keeps configuration, initialisation and files.

For projections that read the same input x (q, k, v; gate, up) with frozen weights W_i, adapters
A_i (r x in), B_i (out x r) and one dropout mask M:

    y_i = x W_i' + s (x M / (1 - p)) A_i' B_i'

peft computes each y_i apart: a copy of x in fp32, a mask and a sum for each. Here one autograd
function does the group: the base product and the low-rank product accumulate in place, the A_i
are one matrix, x is saved once, dropped out, in the base's precision, of the mask only its bits
(off the CPU its seed).

One mask for a group leaves the distribution of each projection's dropout as it is; only the noise
of its members is correlated. Quantised bases and layers with a bias stay with peft.

Masks are kept for the backward pass: on a CPU as bits, elsewhere as a seed. torch's bernoulli_
takes 5 ns an element on a CPU, more than the rest of an adapter's forward pass; `draw_keep_bits`
takes a twentieth of it. And-ing a tensor with a mask takes a fifth of the time of a multiplication.
"""

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
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type as wide as a floating one, by bytes."""
_GENERATOR = np.random.SFC64(0)
"""Seeded anew for each mask: to construct a generator takes as long as to draw a mask."""


class _FusedLora(torch.autograd.Function):
    """All projections of a group; see the module's docstring for the formula."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scaling: float, p: float, seed: int, *matrices: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Returns y_i: (tokens, out_i).

        Args:
            x: (tokens, in).
            p: share of x that is dropped; of 0, `seed` is not read.
            matrices: W_1 A_1 B_1 W_2 ...
        """
        weights, lora_A, lora_B = matrices[::3], matrices[1::3], matrices[2::3]
        ranks, factor = [len(a) for a in lora_A], scaling / (1 - p)
        stacked_A = (torch.cat(lora_A) * factor).to(x.dtype)
        # Contiguous (r, out): the products with it take a tenth less time.
        lora_B_t = [b.to(x.dtype).T.contiguous() for b in lora_B]
        # The backward pass reads x only as the low-rank product did, so that is what is saved.
        dropped, bits = x, None
        if p:
            bits = draw_keep_bits(seed, x.numel(), p) if x.device.type == "cpu" else seed
            dropped = apply_mask(x, keep_mask(bits, p, x))
        after_A = dropped @ stacked_A.T
        outputs = [x @ weight.T for weight in weights]
        for output, b, part in zip(outputs, lora_B_t, after_A.split(ranks, dim=1), strict=True):
            output.addmm_(part, b)
        kept = bits if isinstance(bits, torch.Tensor) else None  # of a seed the mask is drawn again
        ctx.save_for_backward(stacked_A, after_A, dropped, kept, *weights, *lora_B_t)
        ctx.settings = p, seed, ranks, factor, lora_A[0].dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        p, seed, ranks, factor, adapter_dtype = ctx.settings
        stacked_A, after_A, dropped, bits, *rest = ctx.saved_tensors
        weights, lora_B_t = rest[: len(ranks)], rest[len(ranks) :]
        grad_after_A = torch.cat(
            [g @ b.T for g, b in zip(grad_outputs, lora_B_t, strict=True)], dim=1
        )
        grad_input: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_after_A @ stacked_A
            if p:
                mask = keep_mask(seed if bits is None else bits, p, grad_input)
                grad_input.view(mask.dtype).bitwise_and_(mask)
            for g, weight in zip(grad_outputs, weights, strict=True):
                grad_input.addmm_(g, weight)
        grads_A = ((grad_after_A.T @ dropped).to(adapter_dtype) * factor).split(ranks)
        parts = after_A.T.contiguous().split(ranks)
        grads: list[torch.Tensor | None] = []
        for grad_A, part, g in zip(grads_A, parts, grad_outputs, strict=True):
            grads += [None, grad_A, (part @ g).T.to(adapter_dtype)]
        return grad_input, None, None, None, *grads


@dataclass
class _Group:
    """Projections that read one input: the first one called computes all, the others collect."""

    members: list[LoraLinear]
    input: torch.Tensor | None = None
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of member `index` for x of shape (..., in)."""
        if self.input is not x or index not in self.outputs:
            self.outputs = dict(enumerate(self._compute(x)))
            self.input = x
        output = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
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
        # From torch's generator, which checkpoints and recomputation restore.
        seed = int(torch.randint(2**62, (1,))) if p else 0
        flat = x.reshape(-1, x.shape[-1]).to(matrices[0].dtype)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            outputs = _FusedLora.apply(flat, first.scaling[name], p, seed, *matrices)  # type: ignore[no-untyped-call]
        return [output.view(*x.shape[:-1], -1) for output in outputs]


def fuse(model: Any) -> int:
    """Replace the LoRA arithmetic of a peft model where the fused one applies.

    Returns:
        Layers left to peft.
    """
    left = 0
    for parent in model.modules():
        layers = {n: c for n, c in parent.named_children() if isinstance(c, LoraLayer)}
        fusable = {name: layer for name, layer in layers.items() if _is_fusable(layer)}
        left += len(layers) - len(fusable)
        together = [[name for name in names if name in fusable] for names in GROUPS]
        alone = [[name] for name in fusable if not any(name in names for names in together)]
        for names in (*together, *alone):
            group = _Group([fusable[name] for name in names])
            for index, member in enumerate(group.members):
                member.forward = partial(_forward, group, index, member.forward)
    return left


def forget(model: Any) -> None:
    """Drop outputs that no member collected because a forward pass was aborted: their graph holds
    the activations of every earlier layer."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            forward.args[0].outputs, forward.args[0].input = {}, None


def _is_fusable(layer: LoraLayer) -> bool:
    """Whether the fused arithmetic is the layer's: a plain linear layer without bias."""
    base = layer.get_base_layer()
    return type(layer) is LoraLinear and type(base) is torch.nn.Linear and base.bias is None


def _forward(group: _Group, index: int, peft_forward: Any, x: torch.Tensor) -> Any:
    """The group's forward, or peft's while the adapter is switched off."""
    off = group.members[index].disable_adapters
    return peft_forward(x) if off else group.project(index, x)


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
