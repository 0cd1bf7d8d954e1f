"""Runs harmed for long: every figure of docs/survival.md.

    python bench/soak.py ROW...        or: all

kills        kill -9 at 100 random moments, the same command again
boundaries   kill -9 before every touch of a file in a save, then 10 runs killed five deep there
damage       every file of a checkpoint x missing, empty, half, one bit, another run's
drift        config, data, tokenizer, template or base changed in 12 ways
threads      kill -9 after a save, continued with another number of threads
signals      SIGTERM and Ctrl-C in every place, and a second one
finite       NaN and infinity in loss, gradient, evaluation; first, middle, last step
disk         a volume with 12 amounts of free space at a save
best         the lowest evaluation at each of 8 positions, evaluation 2, save 4
long         20,000 updates, 400 saves: memory and file handles
cost         seconds of everything that is there for safety, in a run of the demo

torch is imported once; each victim is a fork. Rows are kept in bench/results/survival.json;
`make docs` writes them to the page.
"""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "survival.json"
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests", "tools")]

import victims  # noqa: E402
from victims import SAVE, STEPS, harmed, print_of, usable  # noqa: E402

from fintune import files, seal  # noqa: E402
from fintune.config import Config, load_config  # noqa: E402
from fintune.console import result  # noqa: E402
from fintune.data.prepare import prepare  # noqa: E402
from fintune.errors import FintuneError  # noqa: E402
from fintune.files import read_json, read_jsonl, sha256_file, write_json  # noqa: E402
from fintune.sample import local_base  # noqa: E402
from fintune.stop import STOP  # noqa: E402
from fintune.training import checkpoint  # noqa: E402
from fintune.training import train as loop  # noqa: E402
from fintune.training.rows import Order  # noqa: E402
from fintune.training.train import train  # noqa: E402

KILLS, CHAINS, DEEP, SIZES = 100, 10, 5, 12
Row = dict[str, Any]


class Bench:
    """What all rows share: rows and base, and the run that nobody harms."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._runs = folder, 0
        self.data, self.base = victims.materials(folder / "materials")
        self.config, start = self.new(), time.monotonic()
        outcome = harmed(lambda: train(self.config))
        self.seconds = outcome.ended - start
        self.mark = print_of(self.config)

    def new(self, *changes: str) -> Config:
        """The config of the same run in a folder of its own."""
        self._runs += 1
        return victims.settings(self.folder / f"run-{self._runs}", self.data, self.base, *changes)

    def same(self, config: Config) -> bool:
        """Run the command once more: whether it ends, and as the run that nobody harmed."""
        outcome = harmed(lambda: train(config))
        if outcome.code:
            result(outcome.text)
        return outcome.code == 0 and print_of(config) == self.mark


def kills(bench: Bench) -> Row:
    """Runs of 20 updates, each killed until it ends; moments uniform over a whole run."""
    moments, made, same, runs = random.Random(1), 0, 0, 0
    for config, own in victims.killed_runs(
        lambda number: bench.new(), bench.seconds, KILLS, moments.random
    ):
        made, runs = made + own, runs + 1
        same += print_of(config) == bench.mark
    return {"kills": made, "runs": runs, "identical_runs": same, "save_every": SAVE}


def threads(bench: Bench) -> Row:
    """One thread, killed, then two, and the reverse: both end as the run that kept its threads."""

    def command(config: Config, count: int, *, kill: bool = False) -> bool:
        """Whether the process was killed, after its first save."""
        file = bench.folder / "threads.json"
        file.write_text(config.model_dump_json(exclude_none=True))
        words = [sys.executable, "-m", "fintune", "train", "-c", str(file)]
        more = {"OMP_NUM_THREADS": str(count), "PYTHONPATH": str(ROOT / "src")}
        with subprocess.Popen(words, env=os.environ | more) as process:
            while kill and process.poll() is None and not usable(config):
                time.sleep(0.005)
            alive = process.poll() is None
            if kill:
                process.kill()
        return kill and alive

    found: Row = {}
    for first, then in ((1, 2), (2, 1)):
        whole, broken = bench.new(), bench.new()
        command(whole, first)
        killed = command(broken, first, kill=True)
        command(broken, then)
        same = print_of(broken) == print_of(whole)
        found[f"{first}, then {then}"] = {"killed": killed, "identical": same}
    return {"orders": found}


def boundaries(bench: Bench) -> Row:
    """Touches of files by the third save of a run: best adapter, checkpoint, rotation."""
    log = bench.folder / "touches"

    def note(count: int) -> None:
        with log.open("a") as file:
            file.write(f"{count}\n")

    def first(step: int) -> int:
        """Touches until the save of a step is over."""
        log.unlink(missing_ok=True)
        config = bench.new(f"train.max_steps={step}")
        harmed(lambda: train(config), victims.at_boundary(config.run_dir, 0, note))
        return len(log.read_text().splitlines())

    # Two saves stand when the third begins, so its rotation removes one.
    start, end = first(2 * SAVE), first(3 * SAVE)
    usable_always, same = True, 0
    for number in range(start + 1, end + 1):
        config = bench.new()
        harm = victims.at_boundary(config.run_dir, number, victims.die)
        assert harmed(lambda c=config: train(c), harm).code == -signal.SIGKILL
        usable_always &= len(usable(config)) >= 1
        same += bench.same(config)
    place, deep_same = random.Random(2), 0
    for _ in range(CHAINS):
        config, had = bench.new(), 0
        for _ in range(DEEP):
            number = place.randrange(1, end // 2)
            harmed(
                lambda c=config: train(c), victims.at_boundary(config.run_dir, number, victims.die)
            )
            usable_always &= len(usable(config)) >= had
            had = min(1, len(usable(config)))
        deep_same += bench.same(config)
    return {
        "boundaries": end - start,
        "identical": same,
        "chains_five_deep": CHAINS,
        "chains_identical": deep_same,
        "never_without_a_usable_checkpoint": usable_always,
    }


def damage(bench: Bench) -> Row:
    """Each file of the newest checkpoint harmed in place; another run's is of another seed."""
    other = bench.new("seed=7")
    assert harmed(lambda: train(other)).code == 0
    folder = bench.config.run_dir / "checkpoints"
    newest = folder / f"checkpoint-{STEPS}"
    strange = other.run_dir / "checkpoints" / newest.name
    bits = random.Random(3)
    cases = named = fell_back = 0
    for path in sorted(newest.iterdir()):
        whole, theirs = path.read_bytes(), (strange / path.name).read_bytes()
        flips = []
        for at in (0, len(whole) - 1, *(bits.randrange(len(whole)) for _ in range(8))):
            flips.append(
                whole[:at] + bytes([whole[at] ^ (1 << bits.randrange(8))]) + whole[at + 1 :]
            )
        for harm in (None, b"", whole[: len(whole) // 2], theirs, *flips):
            if harm == whole:  # some files are the same in every run
                continue
            path.unlink()
            if harm is not None:
                path.write_bytes(harm)
            cases += 1
            found = checkpoint.corrupt(newest) or ""
            # A whole manifest of the same step of another run is sound in itself: a file that
            # differs from it is named.
            named += path.name in found or (path.name == seal.DONE and bool(found))
            used = checkpoint.newest_checkpoint(folder)
            fell_back += used is not None and used.name == f"checkpoint-{STEPS - SAVE}"
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
    return {
        "files": len(list(newest.iterdir())),
        "cases": cases,
        "named": named,
        "fell_back": fell_back,
    }


def drift(bench: Bench) -> Row:
    """A run stopped at its seventh update, continued with something changed under it."""
    half = bench.new()
    assert harmed(lambda: train(half), victims.SIGNALS["between micro-batches"]).code == 75
    ways: Row = {}
    for name in victims.drifts(Path(), bench.data, bench.base):
        root = bench.folder / f"drift-{name}"
        root.mkdir()
        change, named = victims.drifts(root, bench.data, bench.base)[name]
        try:
            train(victims.changed(half, change, root))
            ways[name] = "not refused"
        except FintuneError as error:
            ways[name] = "refused by name" if named in str(error) else f"refused: {error}"
    refused = sum(said == "refused by name" for said in ways.values())
    return {"ways": ways, "refused_by_name": refused, "the_run_is_unharmed": bench.same(half)}


def signals(bench: Bench) -> Row:
    """Where a signal meets a run; seconds from it to the end of the process."""
    at, send, mark = victims.at_call, victims.send, bench.folder / "sent"

    def term() -> None:
        send(signal.SIGTERM, mark)

    def interrupt() -> None:
        send(signal.SIGINT, mark)

    def twice() -> None:
        term()
        term()

    places = {
        "in a step": at(loop, "sum_loss", 9, term),
        "between micro-batches": at(Order, "seed", 14, term),
        "in an evaluation": at(loop, "send_to_device", 12, term),
        "in a save": at(torch, "save", 2, term),
        "Ctrl-C in a step": at(Order, "seed", 9, interrupt),
        "while the base is loaded": at(loop, "load_base", 1, term),
        "twice in a step": at(Order, "seed", 26, twice),
    }
    rows: Row = {}
    for name, harm in places.items():
        mark.unlink(missing_ok=True)
        config = bench.new()
        outcome = harmed(lambda c=config: train(c), harm)
        seconds = outcome.ended - float(mark.read_text())
        rows[name] = {
            "exit": outcome.code,
            "seconds": round(seconds, 2),
            "identical": bench.same(config),
        }
    mark.unlink(missing_ok=True)
    root = bench.folder / "stopped-preparation"
    stopped = load_config(
        "demo",
        [
            f"out={root}",
            f"model.path={bench.base}",
            f"data.source={bench.folder / 'materials' / 'rows.jsonl'}",
        ],
    )
    module = sys.modules[prepare.__module__]

    def work() -> None:
        with STOP.listening():
            prepare(stopped)

    outcome = harmed(work, at(module, "write_account", 1, term))
    rows["in preparation"] = {
        "exit": outcome.code,
        "seconds": round(outcome.ended - float(mark.read_text()), 2),
        # The lock's file stays, whoever held it; nothing of the rows does.
        "nothing_left": [path.name for path in root.iterdir()] == [".data.lock"],
    }
    return {"places": rows, "seconds_of_a_step": round(bench.seconds / STEPS, 3)}


def finite(bench: Bench) -> Row:
    """Evaluation at every step, so that it can be the bad one at each."""
    rows, bad = {}, 0
    for where in ("loss", "gradient", "evaluation"):
        for step in (1, STEPS // 2, STEPS):
            config = bench.new("train.eval_steps=1")
            outcome = harmed(lambda c=config: train(c), victims.poisoned(where, step))
            at_once = f"step {step}:" in outcome.text
            for path in config.run_dir.rglob("*.json*"):
                text = path.read_text()
                bad += sum(word in text for word in ("NaN", "Infinity"))
            expected = [n for n in range(SAVE, STEPS + 1, SAVE) if n < step][-2:]
            kept = usable(config) == [f"checkpoint-{n}" for n in expected]
            rows[f"{where}, step {step}"] = {
                "exit": outcome.code, "at_that_step": at_once, "last_good_kept": kept,
            }  # fmt: skip
    return {"cases": rows, "files_with_non_finite_numbers": bad}


def disk(bench: Bench) -> Row:
    """A tmpfs filled at the third save so that a given number of bytes is left.

    The estimate is switched off, so that the save begins and meets the end of the volume inside.
    """
    if not victims.can_mount():
        return {"skipped": "only root can mount a small volume to fill"}
    saved = bench.config.run_dir / "checkpoints" / f"checkpoint-{STEPS}"
    size = sum(path.stat().st_size for path in saved.iterdir())
    rows = []
    for left in np.linspace(0, 0.9 * size, SIZES).astype(int).tolist():
        with victims.small_volume(bench.folder / "volume", 24 * 2**20) as volume:
            config = bench.new(f"train.out={volume / 'run'}")

            def full(volume: Path = volume, left: int = left) -> None:
                files.free_bytes = lambda folder: 2**60
                victims.fill(volume, left)

            harm = victims.at_call(checkpoint, "save", 3, full)
            row: Row = {"bytes_left": left, "exit": harmed(lambda c=config: train(c), harm).code}
            row |= {"intact": usable(config), "half_written": victims.half_written(config.run_dir)}
            (volume / "ballast").unlink()
            row["continued_identically"] = bench.same(config)
        rows.append(row)
    return {"checkpoint_bytes": size, "sizes": rows}


def best(bench: Bench) -> Row:
    """16 updates, evaluation every 2, save every 4; one evaluation is made the lowest."""
    right = []
    for position in range(1, 9):
        config = bench.new("train.max_steps=16", "train.eval_steps=2", "train.save_steps=4")
        copy = bench.folder / f"lowest-{position}"

        def lowest(position: int = position, copy: Path = copy) -> None:
            real, evaluate = loop.sum_loss, loop.evaluate
            state = {"at": 0}

            def sum_loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
                total, count = real(model, batch)
                off = not torch.is_grad_enabled() and state["at"] != position
                return total + off * (5 + state["at"]) * count, count

            def counted(run: Any) -> None:
                state["at"] += 1
                if state["at"] == position:
                    run.model.save_pretrained(copy)
                evaluate(run)

            loop.sum_loss = sum_loss
            loop.evaluate = counted

        assert harmed(lambda c=config: train(c), lowest).code == 0
        released, wanted = (path / checkpoint.ADAPTER for path in (config.run_dir / "best", copy))
        right.append(sha256_file(released) == sha256_file(wanted))
    return {"positions": len(right), "released_is_the_best": sum(right)}


def long(bench: Bench) -> Row:
    """Resident memory and open files of one process, read after each save."""
    changes = ("train.max_steps=20000", "train.num_train_epochs=200", "train.save_steps=50",
               "train.eval_steps=500", "train.logging_steps=50",
               "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1",
               "train.learning_rate=1e-4")  # fmt: skip
    config, samples = bench.new(*changes), bench.folder / "samples.jsonl"

    def sampled() -> None:
        save, file = checkpoint.save, samples.open("w")
        page = os.sysconf("SC_PAGE_SIZE")

        def measured(run: Any, **keywords: Any) -> None:
            save(run, **keywords)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            row = {"resident": resident, "handles": len(os.listdir("/proc/self/fd"))}
            file.write(json.dumps(row) + "\n")
            file.flush()

        checkpoint.save = measured

    start = time.monotonic()
    outcome = harmed(lambda: train(config), sampled)
    rows = list(read_jsonl(samples))
    # The first tenth is warm-up: allocator pools and oneDNN's products fill.
    tenth = len(rows) // 10
    early, late = (
        float(np.mean([row["resident"] for row in part]))
        for part in (rows[tenth : 2 * tenth], rows[-tenth:])
    )
    handles = {row["handles"] for row in rows[1:]}
    return {
        "exit": outcome.code,
        "updates": read_json(config.run_dir / "environment.json")["steps"],
        "saves": len(rows),
        "resident_mb_early": round(early / 1e6, 1),
        "resident_mb_late": round(late / 1e6, 1),
        "growth": round(late / early - 1, 4),
        "handles": sorted(handles),
        "seconds": round(time.monotonic() - start),
    }


def cost(bench: Bench) -> Row:
    """The demo as it is, 100 updates: seconds inside what is there for safety alone."""
    root = bench.folder / "cost"
    changes = [f"out={root}", *local_base(), "train.max_steps=100", "train.eval_steps=50"]
    config = load_config("demo", changes)
    prepare(config)
    spent, log = {}, bench.folder / "spent.json"

    def timed() -> None:
        def watch(owner: Any, name: str, label: str) -> None:
            real = getattr(owner, name)

            def call(*args: Any, **keywords: Any) -> Any:
                start = time.perf_counter()
                try:
                    return real(*args, **keywords)
                finally:
                    spent[label] = spent.get(label, 0.0) + time.perf_counter() - start

            setattr(owner, name, call)

        watch(checkpoint, "save", "checkpoint")
        watch(checkpoint, "save_best", "best adapter")
        watch(files.JsonlLog, "append", "metrics lines")
        watch(loop, "check_weights", "last look")
        watch(loop, "fit", "the whole run")

    def work() -> None:
        train(config)
        log.write_text(json.dumps(spent))

    outcome = harmed(work, timed)
    assert outcome.code == 0, outcome.text
    measured = json.loads(log.read_text())
    run = measured.pop("the whole run")
    return {
        "seconds_of_the_run": round(run, 1),
        "seconds_for_safety": {name: round(value, 3) for name, value in measured.items()},
        "share": round(sum(measured.values()) / run, 5),
    }


ROWS: dict[str, Callable[[Bench], Row]] = {
    row.__name__: row
    for row in (kills, threads, boundaries, damage, drift, signals, finite, disk, best, long, cost)
}


def main(wanted: list[str]) -> None:
    """Measure rows, print each, and keep them in the results file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in ROWS if wanted == ["all"] else wanted:
            start = time.monotonic()
            row = ROWS[name](bench) | {
                "took_s": round(time.monotonic() - start),
                "machine": f"{os.cpu_count()} shared cores, {platform.machine()}, torch 1 thread",
            }
            result(f"{name}: {json.dumps(row, indent=1)}")
            kept = read_json(RESULTS) if RESULTS.is_file() else {}
            kept.pop("format", None)
            write_json(RESULTS, kept | {name: row})


if __name__ == "__main__":
    main(sys.argv[1:] or ["all"])
