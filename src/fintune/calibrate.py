"""A few real steps on this machine: our forward, loss and backward on a base of the same sizes with
random weights and fewer blocks, so that no download is needed. Time and kept activations are
straight lines in the number of blocks; two points give them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import LlamaConfig, LlamaForCausalLM

from fintune import attention
from fintune.batches import plan_evaluation
from fintune.collate import CPU_MULTIPLE, Batch, flat_batch
from fintune.config import Config
from fintune.errors import ModelError
from fintune.example import IGNORE
from fintune.kernels import pointwise
from fintune.loss import sum_loss
from fintune.model import DTYPES, attach, device, precision
from fintune.plan import MEMORY_BAND
from fintune.planning import estimate
from fintune.planning.machines import CONTEXT_BYTES
from fintune.planning.rows import Lengths, lengths, plan_batches, work
from fintune.planning.shapes import Shape, find_shape
from fintune.train import lora, memory

DEPTHS = (1, 3)
"""Blocks of the two models that are timed."""
STEPS = 6
"""Steps of each, the first of which warms up; the median of the others counts."""
CPU = "this CPU"
TIME_BAND = 0.25
"""Above the largest error of six CPU runs (bench/plan.py), in processor seconds: 22 % too few."""
PROCESS_BYTES = 720 * 10**6
"""Resident size of a training process on a CPU without its model: the libraries' own."""
ONEDNN_BYTES = 130 * 10**6
"""Compiled bf16 products that oneDNN keeps (model.py bounds their number)."""
HEAP = 1.5
"""Resident bytes to live ones: tensors come in many sizes and glibc keeps the holes between. These
three are fitted to the runs of bench/plan.py, whose residuals are the band."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibrate.py measured here, for the whole depth of the base.

    Attributes:
        train_s, eval_s: seconds a token, forward and backward; forward alone.
        update_s: seconds of an optimiser step.
        kept: bytes of activations a token.
        matrix_flops: operations a second of one large product.
    """

    train_s: float
    eval_s: float
    update_s: float
    kept: float
    matrix_flops: float


def calibrate(config: Config, shape: Shape, found: Lengths, name: str) -> Calibration:
    """Measure in a precision. Takes some ten seconds at the size of the bundled base.

    Raises:
        ModelError: a base whose blocks are not Llama's, or a quantised one.
    """
    if shape.joined or shape.qk_norm or config.model.quantization != "none":
        raise ModelError(
            "--calibrate times Llama blocks in full precision, and this base is another",
            fix="leave --calibrate out",
        )
    batch = _median_batch(config, shape, found)
    tokens = int(batch["input_ids"].numel())
    points = [_measure(config, shape, depth, batch, name) for depth in DEPTHS]
    low, high = (np.array(point) for point in points)
    slope = (high - low) / (DEPTHS[1] - DEPTHS[0])
    train, evaluation, update, kept = low + slope * (shape.layers - DEPTHS[0])
    return Calibration(
        train_s=float(train) / tokens,
        eval_s=float(evaluation) / tokens,
        update_s=float(update),
        kept=float(kept) / tokens,
        matrix_flops=_matrix_rate(shape, tokens, name),
    )


def this_machine(config: Config, row_count: int | None, mean_tokens: int | None) -> dict[str, Any]:
    """Peak memory and hours here, from a few real steps."""
    shape, found = find_shape(config.model), lengths(config, row_count, mean_tokens)
    on = device()
    cpu, name = on.type != "cuda", precision(config.train.precision, on)
    measured = calibrate(config, shape, found, name)
    multiple = CPU_MULTIPLE if cpu else 1
    own = plan_batches(config, found.train, config.train.micro_batch_size, multiple=multiple)
    whole = work(config, found, own)
    checkpointing = config.train.activation_checkpointing == "on"
    setting = estimate.Setting(
        quantization="none",
        checkpointing=checkpointing,
        micro_batch=own.micro_batch,
        largest=own.largest,
        supervised=round(own.largest * found.supervised),
        element=4 if name == "fp32" else 2,
        cuda=not cpu,
    )
    parts = estimate.memory(shape, config.train.lora, config.train.optimizer, setting)
    if not checkpointing:
        parts["activations"] = int(measured.kept * own.largest)
    process = CONTEXT_BYTES
    if cpu:
        parts["activations"] = int(parts["activations"] * HEAP)
        process = PROCESS_BYTES + (0 if name == "fp32" else ONEDNN_BYTES)
    batches = len(plan_evaluation(found.select, own.largest))
    laid = batches * own.largest if cpu else int(found.select.sum())
    filled = whole.tokens + own.passes * (multiple - 1) / 2
    seconds = {
        "training": filled * measured.train_s + own.updates * measured.update_s,
        "evaluation": whole.evaluations * laid * measured.eval_s,
    }
    flops = estimate.train_flops(shape, config.train.lora, whole, checkpointing=checkpointing)
    return {
        "device": CPU if cpu else torch.cuda.get_device_name(on),
        "precision": name,
        "memory": {**parts, "process": process},
        "peak": estimate.peak(parts) + process,
        "seconds": seconds,
        "hours": sum(seconds.values()) / 3600,
        "matrix_flops": measured.matrix_flops,
        "share_of_matrix_rate": flops / seconds["training"] / measured.matrix_flops,
        "memory_band": MEMORY_BAND,
        "time_band": TIME_BAND,
    }


def _median_batch(config: Config, shape: Shape, found: Lengths) -> Batch:
    """A micro-batch of the plan with a middling number of tokens, of random ids."""
    chosen = plan_batches(config, found.train, config.train.micro_batch_size).middling
    draw = np.random.default_rng(config.seed)
    rows = []
    for length in chosen.tolist():
        ids = draw.integers(0, shape.vocab, length)
        prompt = length - max(round(length * found.supervised), 1)
        labels = np.where(np.arange(length) < prompt, IGNORE, ids)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return flat_batch(rows, CPU_MULTIPLE if device().type == "cpu" else 1)


def _measure(
    config: Config, shape: Shape, depth: int, batch: Batch, name: str
) -> tuple[float, float, float, float]:
    """Seconds of a training pass, of an evaluation pass, of an update; bytes kept."""
    model = _model(config, shape, depth, name)
    batch = send_to_device(batch, model.device)
    kept = memory.kept_bytes(model, batch, name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def train() -> None:
        with memory.autocast(model, name):
            total, count = sum_loss(model.train(), batch)
        (total / count).backward()

    def evaluate() -> None:
        with torch.no_grad(), memory.autocast(model, name):
            sum_loss(model.eval(), batch)

    if config.train.activation_checkpointing == "on":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return _typical(train), _typical(evaluate), _typical(optimizer.step), kept


def _model(config: Config, shape: Shape, depth: int, name: str) -> Any:
    llama = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device(device()):
        base = LlamaForCausalLM._from_config(
            llama, attn_implementation=attention.NAME, dtype=DTYPES[name]
        )
    base.requires_grad_(False)
    model = attach(base, config.train.lora, config.seed)
    pointwise.fuse(model)
    lora.fuse(model, shared_dropout=config.train.lora.shared_dropout)
    return model


def _typical(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(STEPS):
        start = perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return median(seconds[1:])


def _matrix_rate(shape: Shape, tokens: int, name: str) -> float:
    """Operations a second of the widest product of the base."""
    left = torch.ones(tokens, shape.hidden, dtype=DTYPES[name], device=device())
    right = torch.ones(shape.intermediate, shape.hidden, dtype=left.dtype, device=left.device)
    return 2 * tokens * shape.hidden * shape.intermediate / _typical(lambda: left @ right.T)
