"""The engine computes what it replaces: loss and every adapter gradient, fp32 and fp64."""

import contextlib
import gc
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import SEVEN_PROJECTIONS
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fintune import attention, config, cpu
from fintune.batches import plan_epoch
from fintune.collate import Collator, padded_batch, padding_free_batch
from fintune.example import IGNORE_INDEX
from fintune.loss import chunked_cross_entropy, sum_loss
from fintune.model import Base, attach, load_base
from fintune.training import lora, pointwise

LENGTHS = (10, 30, 17, 5)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = list(TOLERANCE)


def model(dtype: torch.dtype, dropout: float = 0.0, **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_implementation=attention.NAME,
    )
    base = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    attention.traits(base)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": list(SEVEN_PROJECTIONS)} | changes
    peft = get_peft_model(
        base, LoraConfig(lora_dropout=dropout, init_lora_weights=False, **settings)
    )
    return peft.to(dtype).train()


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    torch.manual_seed(1)
    ids = [torch.randint(0, 300, (length,)).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [IGNORE_INDEX] * 3 + row[3:]} for row in ids]


def gradients(peft: PeftModel, *batches: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and adapter gradients of one step over micro-batches, divided by all its tokens."""
    peft.zero_grad()
    parts = [sum_loss(peft, batch) for batch in batches]
    count = sum(tokens for _, tokens in parts)
    loss = sum(total for total, _ in parts) / count
    loss.backward()
    found = {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}
    assert found and all("lora_" in name for name in found)
    return float(loss.detach()), found


def assert_same(first: Any, second: Any, dtype: torch.dtype) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    for name, gradient in first[1].items():
        scale = max(float(gradient.norm()), 1e-9)
        assert float((gradient - second[1][name]).norm()) <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_free_is_padded(dtype: torch.dtype) -> None:
    peft = model(dtype)
    padded, flat = (
        gradients(peft, padded_batch(rows(), 0)),
        gradients(peft, padding_free_batch(rows())),
    )
    assert_same(padded, flat, dtype)
    assert_same(flat, gradients(peft, padding_free_batch(rows(), pad_to_multiple_of=32)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulated_steps_are_one_step(dtype: torch.dtype) -> None:
    lengths = tuple(range(6, 70))
    examples, peft = rows(lengths), model(dtype)
    step = plan_epoch(config.Config(), np.array(lengths))[0]
    whole = gradients(peft, padding_free_batch(examples))
    dealt = gradients(peft, *(padding_free_batch([examples[i] for i in batch]) for batch in step))
    assert len(step) == 4
    assert_same(whole, dealt, dtype)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("full_logits", [False, True])
def test_by_example_an_answer_of_one_token_counts_as_a_long_one(
    padding_free: bool, full_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is the mean over examples of the mean over each one's label tokens."""
    if full_logits:
        monkeypatch.setattr("fintune.loss.why_full_logits", lambda _: "asked for")
    peft, examples = model(torch.float32), rows((5, 40, 17))
    collator = Collator(padding_free, 0, 32, by_example=True)
    batches = [collator(examples[:2]), collator(examples[2:])]
    found = gradients(peft, *batches)
    assert [collator.loss_count(batch) for batch in batches] == [2, 1]
    peft.zero_grad()
    alone = [sum_loss(peft, padding_free_batch([row])) for row in examples]
    loss = sum(total / count for total, count in alone) / 3
    loss.backward()
    mean = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    assert_same(found, (float(loss.detach()), mean), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 300 * 3, 2**20])
def test_chunked_loss_is_cross_entropy(
    dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fintune.loss.CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    weight, targets = torch.randn(300, 16, dtype=dtype), torch.randint(0, 300, (20,))
    hidden = torch.randn(20, 16, dtype=dtype, requires_grad=True)
    chunked = chunked_cross_entropy(hidden, weight, targets)
    (chunked_gradient,) = torch.autograd.grad(chunked * 0.7, hidden)
    full = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (full_gradient,) = torch.autograd.grad(full * 0.7, hidden)
    assert float(chunked) == pytest.approx(float(full), rel=1e-6)
    assert float((chunked_gradient - full_gradient).norm()) <= TOLERANCE[dtype] * float(
        full_gradient.norm()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_lora_is_pefts(dtype: torch.dtype) -> None:
    peft = model(dtype)
    before = gradients(peft, padding_free_batch(rows()))
    assert not lora.fuse(peft)
    assert_same(before, gradients(peft, padding_free_batch(rows())), dtype)


def test_fused_norms_are_transformers() -> None:
    peft = model(torch.float32)
    for name, parameter in peft.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    before = gradients(peft, padding_free_batch(rows()))
    layers = peft.config.num_hidden_layers
    assert pointwise.fuse(peft) == 2 * layers + 1
    assert_same(before, gradients(peft, padding_free_batch(rows())), torch.float32)


def test_a_norm_of_another_formula_is_left_alone() -> None:
    gemma, llama = (
        GemmaRMSNorm(16).requires_grad_(False),
        LlamaRMSNorm(16).requires_grad_(False),
    )
    assert pointwise.fuse(torch.nn.ModuleList([gemma])) == 0
    assert pointwise.fuse(torch.nn.ModuleList([LlamaRMSNorm(16)])) == 0, "its weight is trained"
    assert pointwise.fuse(torch.nn.ModuleList([llama])) == 1


def test_the_written_out_rotation_is_transformers() -> None:
    """On q and k as attention hands them over: transposed, in the base's precision."""
    assert pointwise.fuse(model(torch.float32))
    ours = modeling_llama.apply_rotary_pos_emb
    torch.manual_seed(0)
    for dtype, near in ((torch.float64, 1e-12), (torch.bfloat16, 2**-7)):
        q = torch.randn(1, 9, 4, 16, dtype=dtype).transpose(1, 2).requires_grad_()
        k = torch.randn(1, 9, 2, 16, dtype=dtype).transpose(1, 2).requires_grad_()
        cos, sin = torch.randn(2, 1, 9, 16, dtype=dtype)
        found = []
        for rotate in (ours, ours.__wrapped__):
            turned = rotate(q, k, cos, sin)
            back = torch.autograd.grad(sum((t * t.detach()).sum() for t in turned), (q, k))
            found.append((*turned, *back))
        for one, other in zip(*found, strict=True):
            assert (one - other).norm() <= near * other.norm()


def test_another_rotation_is_left_alone() -> None:
    """Cohere turns neighbours; some models turn bf16 heads in fp32."""
    before = modeling_cohere.apply_rotary_pos_emb
    pointwise.fuse_rotary(modeling_cohere)
    assert modeling_cohere.apply_rotary_pos_emb is before
    pointwise.fuse_rotary(modeling_llama)
    q, cos = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16).requires_grad_(), torch.randn(1, 3, 8)
    ours = modeling_llama.apply_rotary_pos_emb
    for one, other in zip(ours(q, q, cos, cos), ours.__wrapped__(q, q, cos, cos), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_fused_norms_round_as_transformers_does() -> None:
    """bf16: the output to the bit nearly everywhere, the gradient within its rounding."""
    torch.manual_seed(0)
    plain, fused = (LlamaRMSNorm(64).bfloat16().requires_grad_(False) for _ in range(2))
    plain.weight.uniform_(0.5, 1.5)
    fused.load_state_dict(plain.state_dict())
    assert pointwise.fuse(torch.nn.ModuleList([fused])) == 1
    x, gradient = torch.randn(2, 500, 64).bfloat16()
    found = []
    for module in (plain, fused):
        at = x.clone().requires_grad_()
        y = module(at)
        y.backward(gradient)
        found += [y.detach().float(), at.grad.float()]  # type: ignore[union-attr]
    assert (found[0] != found[2]).double().mean() < 1e-3
    assert (found[1] - found[3]).norm() <= 1e-3 * found[1].norm()


@pytest.mark.parametrize("seeded", [False, True])
def test_fused_dropout_is_pefts_given_the_same_masks(
    seeded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft's dropout modules replay the masks that the fused forward drew; `seeded`: as off the
    CPU, where the backward pass draws them again from their seeds."""
    drawn: list[torch.Tensor | int] = []
    draw = lora.draw_keep_bits

    def record(seed: int, count: int, p: float) -> torch.Tensor | int:
        drawn.append(seed if seeded else draw(seed, count, p))
        return drawn[-1]

    monkeypatch.setattr(lora, "draw_keep_bits", record)
    peft = model(torch.float64, dropout=0.25)
    lora.fuse(peft)
    torch.manual_seed(5)
    fused = gradients(peft, padding_free_batch(rows()))
    masks = iter(drawn)

    class Replay(torch.nn.Module):
        """Takes a mask when called on a new input, the same one for the group's other members."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[int, torch.Tensor | int] = {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if id(x) not in self.seen:
                self.seen = {id(x): next(masks)}
                self.kept = x  # keeps the id from being used again
            kept = lora.keep_mask(self.seen[id(x)], 0.25, x) != 0
            return x * kept.to(x.dtype) / (1 - 0.25)

    plain, replay = model(torch.float64, dropout=0.25), Replay()
    for module in plain.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = replay
    assert_same(fused, gradients(plain, padding_free_batch(rows())), torch.float64)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("p", [0.002, 0.1, 0.5, 0.9])
def test_a_mask_is_independent_choices_of_the_asked_share(p: float, seeded: bool) -> None:
    """Within five standard deviations: the share, and the share of neighbours dropped together."""
    count = 2_000_000
    source = 7 if seeded else lora.draw_keep_bits(7, count, p)
    mask = lora.keep_mask(source, p, torch.empty(count, dtype=torch.bfloat16))
    assert set(mask.unique().tolist()) <= {0, -1}
    dropped = lora.apply_mask(torch.ones(count, dtype=torch.bfloat16), mask).float() == 0
    beside = dropped[:-1] & dropped[1:]
    apart = count // 16  # decisions of one word lie this far from each other
    together = dropped[:-apart] & dropped[apart:]
    for found, share in ((dropped, p), (beside, p * p), (together, p * p)):
        deviation = (share * (1 - share) / count) ** 0.5
        assert float(found.double().mean()) == pytest.approx(share, abs=5 * deviation)
    again, other = lora.draw_keep_bits(7, 64, p), lora.draw_keep_bits(8, 64, p)
    assert torch.equal(again, lora.draw_keep_bits(7, 64, p))
    assert p < 0.1 or not torch.equal(again, other)


def test_a_forward_pass_that_ends_half_way_holds_nothing() -> None:
    """As memory that runs out in the activation function does, when `up` waits to be collected."""
    peft = model(torch.float32)
    lora.fuse(peft)
    mlp, seen = peft.get_base_model().model.layers[1].mlp, []
    for layer in peft.get_base_model().model.layers:
        layer.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))

    def full(module: torch.nn.Module, x: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    mlp.act_fn.register_forward_pre_hook(full)
    batch = padding_free_batch(rows())
    with contextlib.suppress(torch.OutOfMemoryError):
        sum_loss(peft, batch)
    assert seen[0]() is not None, "the graph of the first layer hangs on it"
    lora.forget(peft)
    gc.collect()
    assert seen[0]() is None


def test_off_the_cpu_grouped_heads_are_repeated() -> None:
    """No kernel of torch but flash attention groups them; `meta` has shapes and no arithmetic."""
    query, key = torch.empty(1, 4, 9, 8, device="meta"), torch.empty(1, 2, 9, 8, device="meta")
    found, _ = attention.attend(
        torch.nn.Module(), query, key, key, None, cu_seq_lens_q=torch.tensor([0, 4, 9])
    )
    assert found.shape == (1, 9, 4, 8)


@pytest.mark.parametrize("sizes", [(40, 3, 192, 1), (256, 257), (600,)])
def test_attention_of_bf16_on_a_cpu_is_causal_attention(sizes: tuple[int, ...]) -> None:
    """Output and gradients against float64 by torch's kernel; values narrower than keys."""
    torch.manual_seed(0)
    tokens, ends = sum(sizes), torch.tensor([0, *sizes]).cumsum(0)
    shapes = (1, 6, tokens, 32), (1, 2, tokens, 32), (1, 2, tokens, 16)
    inputs = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    gradient = torch.randn(1, tokens, 6, 16).to(torch.bfloat16)

    def found(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
        output, _ = attention.attend(
            torch.nn.Module(), *leaves, None, scaling=0.3, cu_seq_lens_q=ends
        )
        output.backward(gradient.to(dtype))
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for one, exact in zip(found(torch.bfloat16), found(torch.float64), strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one - exact).norm()) < 0.006 * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_of_inference_are_torchs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """42 rows are filled up to 48; in fp32 oneDNN's product as on an AMD processor; with and
    without a bias; gradients go on as before."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC", "avx512_f": True}
    )
    layers = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Linear(64, 24, bias=False))
    layers, x = layers.to(dtype), torch.randn(2, 21, 48, dtype=dtype)
    expected = layers(x)
    cpu.speed_up_linear(layers)
    near = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    with torch.inference_mode():
        torch.testing.assert_close(layers(x), expected.detach(), **near)
        torch.testing.assert_close(layers(x[:, :1]), expected[:, :1].detach(), **near)
    assert layers(x).requires_grad


def test_neighbours_do_not_see_each_other() -> None:
    """Other tokens in one sequence leave the others' input gradients bit-identical."""
    peft = model(torch.float32)
    lora.fuse(peft)
    examples = rows()
    changed = [examples[0], {**examples[1], "input_ids": [7] * 30}, *examples[2:]]

    def input_gradients(batch_rows: list[dict[str, list[int]]]) -> list[torch.Tensor]:
        batch = padding_free_batch(batch_rows)
        embedded = peft.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
        supervised = batch["labels"] != IGNORE_INDEX
        batch["labels"][0, 10:40] = IGNORE_INDEX  # the losses of the *other* sequences
        logits = peft(inputs_embeds=embedded, **{k: v for k, v in batch.items() if k != "labels"})
        kept = supervised & (batch["labels"] != IGNORE_INDEX)
        loss = F.cross_entropy(logits.logits[kept], batch["labels"][kept], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, embedded)
        return list(gradient[0].split(LENGTHS))

    first, second = input_gradients(examples), input_gradients(changed)
    for index in (0, 2, 3):
        assert torch.equal(first[index], second[index])
        assert first[index].any()
    assert not first[1].any(), "a sequence whose loss is left out gets no gradient"


def test_layers_with_a_bias_stay_with_peft() -> None:
    """As Qwen2's q, k and v have one."""
    peft = model(torch.float32)
    for layer in peft.get_base_model().model.layers:
        base = layer.self_attn.q_proj.get_base_layer()
        base.bias = torch.nn.Parameter(torch.ones(len(base.weight)), requires_grad=False)
    before = gradients(peft, padding_free_batch(rows()))
    assert lora.fuse(peft) == 2
    assert_same(before, gradients(peft, padding_free_batch(rows())), torch.float32)


def test_a_switched_off_adapter_is_the_base() -> None:
    peft = model(torch.float32).eval()
    lora.fuse(peft)
    batch = {k: v for k, v in padding_free_batch(rows()).items() if k != "labels"}
    with torch.no_grad(), peft.disable_adapter():
        off = peft(**batch).logits
    with torch.no_grad():
        assert not torch.allclose(off, peft(**batch).logits)
        assert torch.equal(off, peft.unload()(**batch).logits)


def test_checkpointing_gives_the_same_gradient() -> None:
    peft = model(torch.float32, dropout=0.1)
    lora.fuse(peft)

    def seeded() -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        return gradients(peft, padding_free_batch(rows()))

    plain = seeded()
    peft.get_base_model().activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )
    assert_same(plain, seeded(), torch.float32)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_base_trains_on_flat_batches(quantization: str, tiny_base: Path) -> None:
    """bitsandbytes' layers keep peft's arithmetic; the loss is near that of the whole base."""
    losses = []
    for name in ("none", quantization):
        base = load_base(Base("test/tiny", "", tiny_base), name, "bf16")
        peft = attach(base, config.LoraConfig(r=4, lora_dropout=0.0), seed=0)
        left = lora.fuse(peft)
        total, count = sum_loss(peft, padding_free_batch(rows()))
        (total / count).backward()
        losses.append(float(total) / count)
    assert left == 14
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    ups = [p.grad for n, p in peft.named_parameters() if "lora_B" in n]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in ups)


def test_a_model_that_flat_batches_would_leak_in_is_padded() -> None:
    """Convolutions run across sequences; chunks and dropout of attention are not `attend`'s."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert attention.why_padded(LlamaForCausalLM(LlamaConfig(**sizes))) is None
    mixed = Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=["conv", "full_attention"]))
    assert "conv" in (attention.why_padded(mixed) or "")
    dropping = LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.5))
    assert "dropout" in (attention.why_padded(dropping) or "")


def test_the_supervised_loss_is_the_models_own_with_full_logits() -> None:
    """`sum_loss` leaves positions and logits out; every adapter gradient is as with all of them."""
    peft = model(torch.float64)
    batch = padding_free_batch(rows())
    own = gradients(peft, dict(batch))
    labels = batch.pop("labels")
    peft.zero_grad()
    logits = peft(**batch, use_cache=False).logits
    loss = F.cross_entropy(logits[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX])
    loss.backward()
    found = {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}
    assert_same(own, (float(loss.detach()), found), torch.float64)


@pytest.mark.parametrize(("busy", "threads"), [(0, 4), (10, 4), (25, 3), (50, 2), (100, 1)])
def test_threads_are_as_many_as_cores_are_free(
    monkeypatch: pytest.MonkeyPatch, busy: int, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    times = SimpleNamespace(idle=100.0 - busy, nice=0.0)
    monkeypatch.setattr(psutil, "cpu_times_percent", lambda _: times)
    assert cpu.free_threads() == threads
    times.idle, times.nice = 0.0, 100.0 - busy
    assert cpu.free_threads() == threads, "work of a lower priority gives way"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert cpu.free_threads() == 4
