"""RMSNorm under a frozen weight: transformers' arithmetic (fp32 inside, rounded before the weight),
with its input kept in the base's precision and a gradient written out.

Autograd keeps an fp32 copy of the input and walks the formula back operation by operation: on a
CPU 1.7 ms a norm for 1,184 tokens of width 512 in bf16, forward and backward, and 1.1 ms here.
"""

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    """y = w x s with s = (mean(x^2) + epsilon)^-1/2 over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        scale = (norm.square() / x.shape[-1] + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return weight * x.to(precise, copy=True).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dx = s (g w) - x s^3 mean(g w x)."""
        x, weight, scale = ctx.saved_tensors
        inner, precise = (gradient * weight).to(scale.dtype), x.to(scale.dtype)
        along = torch.linalg.vecdot(inner, precise).unsqueeze(-1) * scale**3 / x.shape[-1]
        return inner.mul_(scale).addcmul_(precise, along, value=-1).to(x.dtype), None, None


def fuse(model: torch.nn.Module) -> int:
    """Replace the arithmetic of every frozen RMSNorm that is this formula; returns how many."""
    found = 0
    for module in model.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("RMSNorm") and epsilon and _same(module, epsilon):
            module.forward = partial(_forward, module, epsilon)
            found += 1
    return found


def _forward(module: torch.nn.Module, epsilon: float, x: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = _RMSNorm.apply(x, module.weight, epsilon)  # type: ignore[no-untyped-call]
    return normed


@torch.no_grad()
def _same(module: Any, epsilon: float) -> bool:
    """Tried, as not every class of the name is this formula (Gemma's adds 1 to the weight)."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.requires_grad:
        return False
    probe = torch.linspace(-2, 2, 4 * len(weight)).to(weight).view(4, -1)
    theirs, ours = module(probe), _forward(module, epsilon, probe)
    near = max(2 * torch.finfo(weight.dtype).eps, 1e-5)  # sums of a row differ in their order
    return theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=near, atol=0)
