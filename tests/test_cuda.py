"""The engine's arithmetic on CUDA, held against the CPU's. Skipped where there is no CUDA device.

Needs torch, transformers, peft and the engine's modules alone, not the config layer:
bench/cuda/run.py runs it on a machine without a package index.
"""

import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fintune import attention
from fintune.collate import padding_free_batch
from fintune.loss import sum_loss
from fintune.training import lora, pointwise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPE = {
    "vocab_size": 4_096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LENGTHS = (130, 31, 257, 64)


def made(device: str, dtype: torch.dtype, dropout: float = 0.0) -> Any:
    """The same small model with an adapter that is not zero, fused, wherever it lies."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).requires_grad_(False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=names)
    model = get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    attention.traits(model.get_base_model())
    pointwise.fuse(model)
    assert lora.fuse(model) == 0
    return model.to(device).train()


def batch(device: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(4_096, (n,), generator=draw).tolist() for n in LENGTHS]
    made_up = padding_free_batch(
        [{"input_ids": ids, "labels": [-100] * 9 + ids[9:]} for ids in rows]
    )
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in made_up.items()}


def loss_and_gradients(
    device: str, dtype: torch.dtype = torch.float32, *, checkpointing: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    model = made(device, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with torch.autocast(device, torch.bfloat16, enabled=dtype != torch.float32):
        total, count = sum_loss(model, batch(device))
    (total / count).backward()
    trained = ((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
    return float(total) / count, {n: g.float().cpu() for n, g in trained if g is not None}


def assert_close(found: Any, wanted: Any, loss: float, gradient: float) -> None:
    assert abs(found[0] / wanted[0] - 1) <= loss
    for name, expected in wanted[1].items():
        difference = float((found[1][name] - expected).norm() / expected.norm())
        assert difference <= gradient, f"{name}: {difference:.1e}"


def test_loss_and_gradients_in_fp32_are_the_cpus() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_close(loss_and_gradients("cuda"), loss_and_gradients("cpu"), 1e-5, 1e-3)


def test_loss_and_gradients_in_bf16_are_near_fp32s() -> None:
    assert_close(loss_and_gradients("cuda", torch.bfloat16), loss_and_gradients("cpu"), 1e-2, 1e-1)


def test_recomputing_gives_the_same_gradient() -> None:
    again = loss_and_gradients("cuda", checkpointing=True)
    assert_close(again, loss_and_gradients("cuda"), 1e-6, 1e-5)


def test_a_dropout_mask_is_the_same_when_it_is_drawn_again() -> None:
    """Off the CPU a mask is kept as its seed: two passes of one seed give one gradient."""
    model, found = made("cuda", torch.float32, dropout=0.1), []
    for _ in range(2):
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        total, count = sum_loss(model, batch("cuda"))
        (total / count).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_fp16_learns_with_its_scaler() -> None:
    model, scaler = made("cuda", torch.float16), torch.amp.GradScaler("cuda")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, 1e-2), []
    for _ in range(30):
        with torch.autocast("cuda", torch.float16):
            total, count = sum_loss(model, batch("cuda"))
        scaler.scale(total / count).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total) / count)
    assert losses[-1] < 0.9 * losses[0] and all(map(torch.isfinite, map(torch.tensor, losses)))


def test_paged_adamw_steps_while_its_state_does_not_fit() -> None:
    """The published recipe's optimizer, with the device filled but for 1 GB."""
    optimizers = pytest.importorskip("bitsandbytes").optim
    weight = torch.nn.Parameter(torch.zeros(2**27, device="cuda"))  # its states take 0.27 GB
    optimizer = optimizers.PagedAdamW8bit([weight], lr=1e-2)
    weight.grad = torch.ones_like(weight)
    free = torch.cuda.mem_get_info()[0]
    ballast = torch.empty(max(0, free - 2**30), dtype=torch.uint8, device="cuda")
    for _ in itertools.repeat(None, 3):
        optimizer.step()
    assert float(weight[0]) == pytest.approx(-0.03, rel=0.05) and len(ballast) >= 0
