"""Attention inside each sequence's boundaries, registered with transformers; no model code copied.

`NAME` is given to a model as its attention implementation. With boundaries (`cu_seq_lens_q`, from
`collate.padding_free_batch`) a token attends to the earlier tokens of the same sequence only: on
CUDA with `torch.nn.attention.varlen` (flash attention inside torch, nothing to build), elsewhere
with scaled_dot_product_attention, sequence by sequence. Without boundaries (generation, padded
batches) it is transformers' sdpa, on a CPU without its copies of keys and values.

Whether a model may be given it is not read from names in its configuration: `traits` tries two
tokens and sees what each layer asks of its attention (a sliding window, a soft cap, sinks), which
layers ask for none (Mamba, convolutions), and whether the logits are what the output layer returns.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fintune.cpu import causal_attention

NAME = "fintune_varlen"
_TRIAL = "fintune_trial"
_BOUNDARIES = {"cu_seq_lens_q", "max_length_q"}
_HARMLESS = {"position_ids", "use_cache", *_BOUNDARIES}
"""What a layer may hand to its attention besides: positions are in query and key already."""
_IN_SDPA = {"sliding_window", "dropout"}
"""What transformers' sdpa computes on padded batches, by its mask or itself."""
_TRAITS = "_fintune_traits"


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
    grouped = query.shape[1] != key.shape[1]
    if cu_seq_lens_q is None:
        states = (query, key, value, attention_mask)
        if grouped and query.device.type == "cpu":
            return _grouped_on_cpu(*states, scaling), None
        output, _ = sdpa_attention_forward(module, *states, scaling=scaling, **kwargs)
        return output, None
    if _has_varlen(query, value):
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        ends, most = cu_seq_lens_q, max_length_q or 0
        attended = varlen_attn(
            q, k, v, ends, ends, most, most, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
        )
        assert isinstance(attended, torch.Tensor)
        return attended[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    on_cpu = query.device.type == "cpu"
    if on_cpu and query.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query[0], key[0], value[0], sizes, factor)[None], None
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


def _grouped_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """With a mask transformers copies each key for every query of its group: 90 ms a layer and
    token in place of 4, for 64 rows of 740 tokens."""
    causal = mask is None and query.shape[2] > 1
    output = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2)


def _has_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Flash attention wants a CUDA device of capability 8.0, half precision and heads of one width
    of at most 256."""
    if not query.shape[-1] == value.shape[-1] <= 256:
        return False
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
AttentionMaskInterface.register(_TRIAL, _mask)


class Traits(NamedTuple):
    """How a model computes.

    Attributes:
        why_padded: why it cannot be trained on padding-free batches, or None if it can.
        rescales_logits: whether its logits are others than its output layer returns.
    """

    why_padded: str | None
    rescales_logits: bool


def traits(model: Any) -> Traits:
    """Try a model once, and give it the attention that it can have: `NAME`, else transformers'
    sdpa, else the model's own (eager).

    Args:
        model: a causal language model of transformers; its adapter may be on it.
    """
    if _TRAITS not in vars(model):
        setattr(model, _TRAITS, _try(model))
    known: Traits = getattr(model, _TRAITS)
    return known


def why_padded(model: Any) -> str | None:
    """Why a model cannot be trained on padding-free batches, or None if it can.

    A model qualifies when every layer routes its attention through transformers' interface and
    asks for nothing but causality there, and no other state runs across positions.
    """
    return traits(model).why_padded


@torch.no_grad()
def _try(model: Any) -> Traits:
    """Pass two tokens through a model, computing no attention."""
    asked: list[dict[str, Any]] = []
    outputs: list[Any] = []

    def note(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **more: Any
    ) -> Any:
        asked.append(more)
        return query.new_zeros(query[..., 0].transpose(1, 2).shape + value.shape[-1:]), None

    AttentionInterface.register(_TRIAL, note)
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(_TRIAL)
    hook = model.get_output_embeddings().register_forward_hook(
        lambda *call: outputs.append(call[2])
    )
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    # Without a mask transformers would read the positions' values, which the meta device lacks.
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=model.device)
    ends = torch.arange(3, dtype=torch.int32, device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": ids, "attention_mask": mask}
    inputs |= {"cu_seq_lens_q": ends, "max_length_q": 1}
    logits, failed = None, ""
    drawn = [model.device] if model.device.type == "cuda" else []
    try:
        # In evaluation bitsandbytes packs its weights anew, and no dropout is asked for.
        with torch.random.fork_rng(drawn):
            logits = model.train()(**inputs, use_cache=False).logits
    except Exception as error:  # a model that wants other inputs
        failed = f"a trial of two tokens ended in {type(error).__name__}"
    finally:
        hook.remove()
        model.train(training)
    kept = ((name, value) for each in asked for name, value in each.items())
    special = {name for name, value in kept if isinstance(value, torch.Tensor) or value}
    special -= _HARMLESS
    bounded = sum(each.keys() >= _BOUNDARIES for each in asked)
    why = failed or _why_padded(model, bounded, special)
    name = NAME
    if why:
        able = model._supports_sdpa and not special - _IN_SDPA
        name = ("sdpa" if before == NAME else before) if able else "eager"
    model.set_attn_implementation(name)
    return Traits(why, not any(logits is each for each in outputs))


def _why_padded(model: Any, calls: int, special: set[str]) -> str | None:
    """Of a trial with so many calls of attention that were told the boundaries, in which layers
    asked for something special."""
    config, modules = model.config.get_text_config(), model.get_decoder().modules()
    other = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention"})
    layers = config.num_hidden_layers
    reasons = {
        f"its attention has {', '.join(sorted(special))}": special,
        f"it has layers of another kind ({', '.join(other)})": other,
        f"{calls} of its {layers} layers give boundaries to transformers' attention": calls
        != layers,
        "it has convolutions": any(isinstance(each, torch.nn.Conv1d) for each in modules),
        "it is stateful": model._is_stateful,
    }
    return next((said for said, holds in reasons.items() if holds), None)
