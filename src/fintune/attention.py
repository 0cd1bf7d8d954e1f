"""Attention inside each sequence's boundaries, registered with transformers; no model code copied.

`NAME` is given to a model as its attention implementation. With boundaries (`cu_seq_lens_q`, from
`collate.padding_free_batch`) a token attends to the earlier tokens of the same sequence only: on
CUDA with `torch.nn.attention.varlen` (flash attention inside torch, nothing to build), elsewhere
with scaled_dot_product_attention, sequence by sequence. Without boundaries (generation, padded
batches) it is transformers' sdpa.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fintune_varlen"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: shape (1, heads, tokens, head_dim) with boundaries, (batch, ...) without.
        key, value: the same with key_value_heads.
        cu_seq_lens_q: int32 boundaries, shape (sequences + 1,), from 0 to tokens.
        max_length_q: tokens of the longest sequence.

    Returns:
        The attended values, shape (batch, tokens, heads, head_dim), and None for the weights.
    """
    if cu_seq_lens_q is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output, None
    grouped = query.shape[1] != key.shape[1]
    if _has_varlen(query):
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        ends, most = cu_seq_lens_q, max_length_q or 0
        attended = varlen_attn(
            q, k, v, ends, ends, most, most, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
        )
        assert isinstance(attended, torch.Tensor)
        return attended[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    # On a CPU torch's flash kernel takes 1.1 ms in fp32 and 4.1 ms in bf16, forward and backward
    # together, for a sequence of 150 tokens and 8 heads of 32; the same at 2,048 tokens.
    on_cpu = query.device.type == "cpu"
    gqa = grouped and on_cpu  # elsewhere torch has no fast kernel that groups
    precise = torch.promote_types(query.dtype, torch.float32) if on_cpu else query.dtype
    if grouped and not gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    parts = [tensor.to(precise).split(sizes, dim=2) for tensor in (query, key, value)]
    with torch.autocast("cpu", enabled=False):  # it would cast them back to bf16
        pieces = [
            F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=True, enable_gqa=gqa)
            for q, k, v in zip(*parts, strict=True)
        ]
    return torch.cat(pieces, dim=2).transpose(1, 2).to(query.dtype), None


def _has_varlen(query: torch.Tensor) -> bool:
    """Flash attention wants a CUDA device of capability 8.0 and half precision."""
    if query.device.type == "meta":  # shapes alone: of a plan for such a device
        return True
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability() >= (8, 0)


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """No mask where there is no padding: `attend` is causal by itself, within boundaries.

    Without this, transformers would see restarting positions and build a (tokens x tokens) mask.
    """
    none = attention_mask is None
    return None if none else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)


def why_padded(model: Any) -> str | None:
    """Why a model cannot be trained on padding-free batches, or None if it can.

    A model qualifies when it routes its attention through transformers' interface, knows no other
    state that runs across positions, and has full attention in every layer.
    """
    config = model.config
    if not model._supports_attention_backend or model._is_stateful:
        return (
            f"{type(model).__name__} does not use transformers' attention interface, or is stateful"
        )
    names = ["attn_logit_softcapping", "attention_chunk_size", "attention_dropout"]
    names += ["sliding_window"] if getattr(config, "use_sliding_window", True) else []
    for name in names:
        if getattr(config, name, None):
            return f"its configuration has {name}"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other:
        return f"it has layers of another kind ({', '.join(sorted(other))})"
    return None
