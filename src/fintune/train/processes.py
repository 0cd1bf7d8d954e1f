"""Several processes of one run: a step shared between them, one of them writing.

An optimizer step is the same for any world size: its `train.gradient_accumulation_steps`
micro-batches are divided among the ranks, its loss by the label tokens of all. So one process and
eight train the same adapter, and a checkpoint of eight is continued by one.

ddp     every process holds the whole base; DDP averages the adapter's gradients.
fsdp    FSDP2 keeps a part of the frozen base on each process and puts a layer together while it is
        needed. The adapter (2 % of an 8B base at rank 64) stays whole everywhere under DDP, so
        checkpoints are the same files as with ddp, written by rank 0.

accelerate ignores its own FSDP setting on a CPU without a word, and shards the adapter where it
does not; DeepSpeed writes its checkpoints itself. `start` refuses both by name.
"""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fintune import console
from fintune.errors import ConfigError, FintuneError, ModelError
from fintune.model import device
from fintune.stop import StopRequest

T = TypeVar("T")
ENGINES = {
    "ACCELERATE_USE_FSDP": "accelerate's FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What `accelerate launch` sets for the engines that a run cannot use."""


def world_size() -> int:
    """Processes of this run, as torchrun and accelerate launch announce them."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_rank0() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def start(strategy: str, quantization: str) -> None:
    """Meet the other processes, and take this one's device. Call it first.

    Raises:
        ConfigError: a strategy was asked for that this run would not have.
    """
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"{variable} asks for {engine}, which a run here does not use",
                why="it would be ignored without a word, or write checkpoints that do not resume",
                fix="launch without it; train.strategy: fsdp keeps the base in parts",
            )
    if strategy != "auto" and world_size() == 1:
        raise ConfigError(
            f"train.strategy={strategy}, and this is the only process",
            fix="launch several: torchrun --nproc-per-node 2 --no-python fintune train ...",
        )
    if strategy == "fsdp" and quantization != "none":
        raise ConfigError(
            f"train.strategy=fsdp with model.quantization={quantization}",
            why="FSDP2 cannot take the packed weights of bitsandbytes apart",
            fix="a quantised base is small: use train.strategy=ddp",
        )
    if world_size() > 1:
        # The others wait while rank 0 writes and hashes; NCCL's own limit is 10 minutes.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=40))
        kind = state.distributed_type.value
        if kind not in ("MULTI_CPU", "MULTI_GPU"):
            raise ConfigError(
                f"{world_size()} processes were launched and accelerate runs them as {kind}",
                why="each would train alone and all would write the same folder",
                fix="unset the ACCELERATE_* variables, or: fintune train in one process",
            )
        console.err.quiet = not is_rank0()


def share(accumulation: int, processes: int) -> int:
    """Micro-batches of an update for each process."""
    each, left = divmod(accumulation, processes)
    if left:
        raise ConfigError(
            f"train.gradient_accumulation_steps={accumulation}: the micro-batches of an optimizer"
            f" step do not divide among {processes} processes",
            why="every process takes as many, so that the step is that of one process",
            fix="change train.gradient_accumulation_steps and train.per_device_train_batch_size;"
            " their product is the examples of an optimizer step",
        )
    return each


def stop_asked(stop: StopRequest) -> bool:
    """Whether any process was asked: all stop at the same step. All must call it."""
    stop.asked = any_rank(stop.asked)
    return stop.asked


def from_rank0(make: Callable[[], T]) -> T:
    """The result of `make` on rank 0, or its FintuneError, on every rank. All must call it."""
    if world_size() == 1:
        return make()
    box: list[Any] = [None]
    if is_rank0():
        try:
            box = [make()]
        except FintuneError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, device=device())
    if isinstance(box[0], FintuneError):
        raise box[0]
    value: T = box[0]
    return value


def any_rank(flag: bool) -> bool:
    """All-reduce of a flag (max): the same answer on every rank. All must call it."""
    if world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def files_of_all(write: Callable[[str], None]) -> dict[str, bytes]:
    """Files that every rank writes into a folder of its own, together, by name."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        own = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    if world_size() == 1:
        return own
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, own)
    return {name: data for files in every for name, data in files.items()}


def shard(model: Any) -> None:
    """Keep only this process's part of the frozen base (FSDP2), layer by layer; the adapter whole.

    Raises:
        ModelError: a base without a list of layers, or a parameter that stayed whole.
    """
    base = model.get_base_model()
    layers = getattr(getattr(base, "model", None), "layers", None)
    if layers is None:
        raise ModelError(
            f"{type(base).__name__} has no model.layers to take apart", fix="train.strategy=ddp"
        )
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in (*layers, base):
        # Also the root: what stays together after a forward pass is taken apart by saving, which
        # only the first rank does, and the next pass would wait for the others for ever.
        fully_shard(module, reshard_after_forward=True, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(device())
    frozen = {name: p for name, p in model.named_parameters() if p not in trained}
    whole = [name for name, parameter in frozen.items() if not isinstance(parameter, DTensor)]
    if whole:
        raise ModelError(f"FSDP2 left {len(whole)} weights whole, such as {whole[0]}")
    # DDP then sees the adapter alone; the name is private, the only way there is.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(frozen))


def wait() -> None:
    """Until every process is here."""
    if world_size() > 1:
        dist.barrier()
