"""Several processes of one run: a step shared between them, rank 0 writing.

An optimizer step is the same for any world size: its `train.gradient_accumulation_steps`
micro-batches are divided among the ranks, its loss by the label tokens of all. So one process and
eight train the same adapter, and a checkpoint of eight is continued by one.

ddp     every process holds the whole base; DDP averages the adapter's gradients.
fsdp    FSDP2 keeps a shard of the frozen base on each process and gathers a layer while it is
        needed. The adapter (2 % of an 8B base at rank 64) stays whole everywhere under DDP, so
        checkpoints are the same files as with ddp, written by rank 0.

FSDP as accelerate sets it up would shard the adapter, and DeepSpeed writes checkpoints itself:
`start` refuses a launch of several processes that accelerate runs as one of them.

A function that says "collective" communicates: every rank has to call it, or the others wait.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import reduce
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fintune import console
from fintune.errors import ConfigError, FintuneError, ModelError, Stopped
from fintune.model import device
from fintune.stop import STOP


def world_size() -> int:
    """Processes of this run, as torchrun and accelerate launch announce them."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def is_rank0() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def start(strategy: str) -> None:
    """Join the process group and take this process's device. Collective; call it first.

    Raises:
        ConfigError: a strategy was asked for that this run would not have.
    """
    if strategy != "auto" and world_size() == 1:
        fix = "launch several: torchrun --nproc-per-node 2 --no-python fintune train ..."
        raise ConfigError(f"train.strategy={strategy}, and this is the only process", fix=fix)
    if world_size() > 1:
        # The others wait while rank 0 writes and hashes; NCCL's default limit is 10 minutes.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=40))
        kind = state.distributed_type.value
        if kind not in ("MULTI_CPU", "MULTI_GPU"):
            what = f"{world_size()} processes were launched and accelerate runs them as {kind}"
            fix = "unset the ACCELERATE_* variables, or: fintune train in one process"
            raise ConfigError(what, fix=fix)
        console.err.quiet = not is_rank0()


@contextmanager
def losing_none() -> Iterator[None]:
    """Stop where another process has ended: this one can neither go on nor save alone.

    Raises:
        Stopped: it waited for a process that is no more.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        if world_size() == 1 or not lost:
            raise
        fix = "see what that one said; the same command continues from the last checkpoint"
        what, why = "another process of this run has ended", str(error).partition(". ")[0]
        raise Stopped(what, why=why, fix=fix) from error


def stop_asked() -> bool:
    """Whether any process was asked to stop: all do at the same step. Collective."""
    STOP.asked = any_rank(STOP.asked)
    return STOP.asked


def from_rank0(make: Callable[[], Any]) -> Any:
    """The result of `make` on rank 0, or its FintuneError, on every rank. Collective."""
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
    return box[0]


def any_rank(flag: bool) -> bool:
    """All-reduce of a flag (max): the same answer on every rank. Collective."""
    if world_size() == 1:
        return flag
    return bool(reduce(torch.tensor(int(flag), device=device()), "max"))


def shard(model: Any) -> None:
    """Keep only this process's shard of the frozen base (FSDP2), layer by layer; the adapter whole.

    Raises:
        ModelError: a base without a list of layers.
    """
    base = model.get_base_model()
    layers = getattr(getattr(base, "model", None), "layers", None)
    if layers is None:
        raise ModelError(f"{type(base).__name__} has no model.layers", fix="train.strategy=ddp")
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in (*layers, base):
        # Also the root: what stays gathered after a forward pass is sharded by saving, which only
        # rank 0 does, and the next pass would wait for the others for ever.
        fully_shard(module, reshard_after_forward=True, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(device())
    frozen = [name for name, parameter in model.named_parameters() if parameter not in trained]
    # DDP then sees the adapter alone; the name is private, the only way there is.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
