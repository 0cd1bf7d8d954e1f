"""Several processes: the same run as one, stopped together, continued by another number of them.

Ranks are forked from this process (imports are paid once) and meet over gloo. Neither NCCL nor a
launch on real GPUs is tested here; docs/several-gpus.md says so.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from frozen import read_json
from safetensors.torch import load_file
from tiny import read_lines
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from victims import HARMS, SIGNALS, usable

from fintune import train
from fintune.batches import plan_epoch
from fintune.collate import Collator, padding_free_batch
from fintune.config import LoraConfig, load_config
from fintune.errors import ConfigError, FintuneError
from fintune.loss import sum_loss
from fintune.model import Base, attach, load_base
from fintune.training import distributed, lora, pointwise
from fintune.training.rows import Order, read_train

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these ranks are CPU processes")
STEPS, DEADLINE_S = 6, 120
LOCAL = {"MASTER_ADDR": "127.0.0.1"}


def settings(root: Path, prepared: Path, base: Path, **changes: Any) -> list[str]:
    values = {
        "out": root,
        "data.out": prepared,
        "model.path": base,
        "model.id": "test/tiny",
        "train.per_device_train_batch_size": 3,
        "train.gradient_accumulation_steps": 4,
        "train.num_train_epochs": 1,
        "train.max_steps": STEPS,
        "train.eval_steps": 3,
        "train.save_steps": 3,
        "train.logging_steps": 1,
        "train.max_eval_samples": 20,
        # At 1e-2 Adam makes of a last digit 1.1e-6 by the fifth step, on a processor with AMX.
        "train.learning_rate": 5e-3,
        "train.precision": "fp32",
        "train.lora.lora_dropout": 0.1,
    }
    return [f"{key}={value}" for key, value in {**values, **changes}.items()]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def rank(number: int, world: int, log: Path, hosts: dict[str, str], work: Callable[[], Any]) -> int:
    """Fork a rank; returns its process id. Its exit status is what the command line's would be."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        here = {
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
        }
        os.environ.update({key: str(value) for key, value in here.items()} | hosts)
        work()
        status = 0
    except FintuneError as error:
        os.write(2, f"{error}\n".encode())
        status = error.exit_code
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def together(
    world: int,
    log: Path,
    work: Callable[[], Any],
    enter: Callable[[int], None] | None = None,
    hosts: dict[str, str] | None = None,
) -> list[int]:
    """Exit codes of `world` ranks that run `work`; all are killed at the deadline."""
    hosts = {**(hosts or LOCAL), "MASTER_PORT": free_port()}

    def job(number: int) -> Callable[[], Any]:
        return lambda: (enter(number) if enter else None, work())

    children = [rank(number, world, log, hosts, job(number)) for number in range(world)]
    codes: dict[int, int] = {}
    start = time.monotonic()
    while len(codes) < world and time.monotonic() - start < DEADLINE_S:
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child, -1) for child in children]


def run(world: int, values: list[str]) -> Path:
    """Train with `world` processes; the run's folder."""
    config = load_config("demo", values)
    config.out.mkdir(parents=True, exist_ok=True)
    log = config.out / "log.txt"
    codes = together(world, log, lambda: train(config))
    assert codes == [0] * world, log.read_text()[-3000:]
    return config.run_dir


def numbers(folder: Path) -> np.ndarray[Any, Any]:
    """Losses, gradient norms and held-out losses of a run, in order."""
    rows = read_lines(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, STEPS + 1)), "each step once, by one writer"
    keys = ("loss", "grad_norm", "eval_loss")
    return np.array([row[key] for row in rows for key in keys if key in row])


def assert_same_run(folder: Path, alone: Path) -> None:
    np.testing.assert_allclose(numbers(folder), numbers(alone), rtol=1e-6)
    ours, theirs = (load_file(f / "best" / "adapter_model.safetensors") for f in (folder, alone))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=5e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prepared: Path, tiny_base: Path) -> Path:
    """The run of one process that the others are compared with."""
    return run(1, settings(tmp_path_factory.mktemp("alone"), prepared, tiny_base))


@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (4, "auto"), (2, "fsdp")])
def test_several_processes_train_the_adapter_of_one(
    world: int, strategy: str, alone: Path, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    folder = run(world, settings(tmp_path, prepared, tiny_base, **{"train.strategy": strategy}))
    assert_same_run(folder, alone)
    assert read_json(folder / "environment.json")["processes"] == world
    assert usable(folder) == ["checkpoint-3", "checkpoint-6"]


LAUNCHES = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--no-python"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        "--no_python",
    ],
}
TWO_NODES = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--no-python"]


def launched(words: list[str], values: list[str], **environment: str) -> subprocess.Popen[str]:
    """A launcher of `fintune train`, in a process group of its own."""
    command = [sys.executable, "-m", *words, str(Path(sys.executable).parent / "fintune"), "train"]
    command += ["-c", "demo", *(word for value in values for word in ("-s", value))]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, start_new_session=True, **output)  # type: ignore[call-overload, no-any-return]


@pytest.mark.skipif("FINTUNE_TEST_ALL" not in os.environ, reason="15 s a launch")
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_the_launchers_themselves_train_the_adapter_of_one(
    launcher: str, alone: Path, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    port = {"MASTER_PORT": free_port(), "PET_MASTER_PORT": free_port()}
    launch = launched(LAUNCHES[launcher], settings(tmp_path, prepared, tiny_base), **port)
    said = launch.communicate(timeout=DEADLINE_S)[0]
    assert launch.returncode == 0, said[-3000:]
    assert_same_run(tmp_path / "run", alone)
    assert read_json(tmp_path / "run" / "environment.json")["processes"] == 2


@pytest.mark.skipif("FINTUNE_TEST_ALL" not in os.environ, reason="15 s a launch")
def test_two_nodes_on_loopback_train_the_adapter_of_one(
    alone: Path, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    words, values = [*TWO_NODES[:-1], *meet, TWO_NODES[-1]], settings(tmp_path, prepared, tiny_base)
    nodes = [launched(words, values) for _ in range(2)]
    said = [node.communicate(timeout=DEADLINE_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert_same_run(tmp_path / "run", alone)


def test_a_killed_rank_ends_all_and_the_same_command_continues(
    alone: Path, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    values = settings(tmp_path, prepared, tiny_base)
    config = load_config("demo", values)

    def work() -> None:
        if os.environ["RANK"] == "1":
            HARMS["killed at the tenth micro-batch"]()  # of its own: the fifth step
        train(config)

    log = tmp_path / "log.txt"
    assert together(2, log, work) == [75, -signal.SIGKILL], log.read_text()[-3000:]
    assert "another process of this run has ended" in log.read_text()
    assert_same_run(run(2, values), alone)


def test_a_signal_to_one_stops_all_at_one_step_and_another_number_goes_on(
    alone: Path, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    values = settings(tmp_path, prepared, tiny_base)
    config = load_config("demo", values)

    def work() -> None:
        if os.environ["RANK"] == "1":
            SIGNALS["after step 2"]()
        train(config)

    log = tmp_path / "log.txt"
    assert together(2, log, work) == [75, 75], log.read_text()[-3000:]
    assert usable(config.run_dir) == ["checkpoint-2"]
    assert not (config.run_dir / "done.json").exists()
    assert_same_run(run(4, values), alone)


def test_the_loss_and_gradients_of_a_sharded_base_are_those_of_a_whole_one(
    tmp_path: Path, tiny_base: Path
) -> None:
    """FSDP2 in three ways: ours, with a head taken apart again, and as accelerate places it."""

    def fused() -> Any:
        model = load_base(Base("test/tiny", "x", tiny_base), "none", "fp32")
        peft = attach(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0), seed=1)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=generator)
        assert pointwise.fuse(peft) and not lora.fuse(peft)
        return peft

    def rows_of(*seeds: int) -> dict[str, Any]:
        rows = []
        for seed in seeds:
            ids = np.random.default_rng(seed).integers(1, 4000, 40 + seed).tolist()
            rows.append({"input_ids": ids, "labels": [-100] * 9 + ids[9:]})
        return padding_free_batch(rows)

    def as_ours(peft: Any) -> None:
        distributed.shard(peft)

    def head_apart(peft: Any) -> None:
        base = peft.get_base_model()
        for module in (*base.model.layers, base):
            fully_shard(module, reshard_after_forward=True)

    def as_accelerate(peft: Any) -> None:
        base = peft.get_base_model()
        for layer in base.model.layers:
            fully_shard(layer)
        fully_shard(
            [base.model.norm, base.model.embed_tokens, base.lm_head], reshard_after_forward=False
        )
        fully_shard(peft)

    def compare() -> None:
        distributed.start("fsdp")
        whole = fused()
        total, count = sum_loss(whole, rows_of(0, 1))
        (total / count).backward()
        for place in (as_ours, head_apart, as_accelerate):
            peft = fused()
            place(peft)
            assert isinstance(
                peft.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight, DTensor
            )
            part, _ = sum_loss(peft, rows_of(dist.get_rank()))
            losses = part.detach().clone()
            dist.all_reduce(losses)
            torch.testing.assert_close(losses, total.detach(), rtol=1e-6, atol=0)
            (part * 2 / count).backward()
            expected = dict(whole.named_parameters())
            for name, parameter in peft.named_parameters():
                if not parameter.requires_grad:
                    continue
                gradient = parameter.grad
                if isinstance(gradient, DTensor):
                    gradient = gradient.full_tensor()
                else:
                    dist.all_reduce(gradient)
                    gradient /= 2
                torch.testing.assert_close(
                    gradient, expected[name].grad, rtol=1e-4, atol=1e-7, msg=f"{place} {name}"
                )

    log = tmp_path / "log.txt"
    assert together(2, log, compare) == [0, 0], log.read_text()[-3000:]


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_strategy_of_several_processes_is_refused_in_one(
    strategy: str, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    changes = {"train.strategy": strategy}
    config = load_config("demo", settings(tmp_path, prepared, tiny_base, **changes))
    with pytest.raises(ConfigError, match="only process"):
        train(config)
    assert not config.run_dir.exists(), "refused before anything was written"


def test_processes_that_accelerate_would_run_apart_are_refused(tmp_path: Path) -> None:
    """What accelerate says it made of the launch is believed, not what was asked for."""

    def apart() -> None:
        state = PartialState(cpu=True)
        dist.barrier()  # else one may be gone while the other still joins
        state.distributed_type = DistributedType.NO
        distributed.start("ddp")

    log = tmp_path / "log.txt"
    assert together(2, log, apart) == [1, 1]
    assert "runs them as NO" in log.read_text()


def test_micro_batches_that_do_not_divide_are_refused(prepared: Path) -> None:
    rows, collator = read_train(prepared), Collator(padding_free=True, pad_token_id=0)
    config = load_config("demo", ["train.gradient_accumulation_steps=4"])
    assert Order(config, rows, collator, 2).accumulation == 2
    with pytest.raises(ConfigError, match="do not divide"):
        Order(config, rows, collator, 3)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_get_equal_tokens(world: int, prepared: Path) -> None:
    """At the published update of 64 examples; what an update waits for is its fullest rank."""
    lengths = np.tile(read_train(prepared).lengths, 20)
    step = ["train.per_device_train_batch_size=16", "train.gradient_accumulation_steps=8"]
    plan = plan_epoch(load_config("demo", step), lengths, world_size=world)
    shares = [[step[number::world] for step in plan] for number in range(world)]
    tokens = np.array(
        [[sum(int(lengths[b].sum()) for b in step) for step in share] for share in shares]
    )[:, :-1]
    assert (tokens.max(0) / tokens.mean(0) - 1).max() <= 0.02


@pytest.fixture
def two_hosts() -> Iterator[Callable[[int], None]]:
    """Enters the network namespace of a rank: two hosts joined by a cable, nothing shared."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts need root and the program `ip`")
    names = [f"fintune{os.getpid()}{side}" for side in "ab"]
    commands = [["ip", "netns", "add", name] for name in names]
    commands += [
        [
            "ip",
            "link",
            "add",
            "va",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "va",
            "netns",
            names[1],
        ]
    ]
    for number, name in enumerate(names):
        commands += [["ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "va"]]
        commands += [["ip", "-n", name, "link", "set", device, "up"] for device in ("va", "lo")]
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

        def enter(number: int) -> None:
            with open(f"/run/netns/{names[number]}") as handle:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(handle.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            os.environ["GLOO_SOCKET_IFNAME"] = "va"

        yield enter
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_train_the_adapter_of_one(
    two_hosts: Callable[[int], None], alone: Path, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    config = load_config("demo", settings(tmp_path, prepared, tiny_base))
    log = tmp_path / "log.txt"
    hosts = {"MASTER_ADDR": "10.77.0.1"}
    codes = together(2, log, lambda: train(config), enter=two_hosts, hosts=hosts)
    assert codes == [0, 0], log.read_text()[-3000:]
    assert_same_run(config.run_dir, alone)
