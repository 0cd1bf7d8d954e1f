"""What this machine can do, and what is missing: `fintune doctor`.

Reads versions from installed metadata and imports torch alone, so that the answer takes about two
seconds. A secret is reported as set or not set, never by its value.
"""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich import box
from rich.table import Table
from safetensors import SafetensorError, safe_open

from fintune import console, nano
from fintune.files import free_bytes

EXTRAS = {
    "data": "near duplicates, language identification, checksums of personal data",
    "judge": "a judge model behind an OpenAI-compatible endpoint",
    "serve": "fintune serve: the page and the OpenAI-compatible server",
    "export": "fintune export gguf and ollama",
    "regression": "eval.regression: lm-eval tasks that must not get worse",
    "dev": "make test",
}
"""What each extra gives; pyproject.toml says what it holds."""
RECIPE_GB = 48
"""Memory of the one GPU that the published 8B recipe needs."""
DEMO_GB = 3
SCRATCH_GB = 20
"""Free disk below which a run of an 8B base (16 GB) would not even hold its weights."""
MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[bold red]missing[/]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact of this machine; only `missing` keeps fintune from working at all."""

    name: str
    status: Literal["ok", "note", "missing"]
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order a reader wants them: software, hardware, access, abilities."""
    return [*_packages(), *_extras(), *_compute(), *_room(), *_access(), _nano(), _recipe()]


def show(findings: list[Finding]) -> None:
    """The findings as a table."""
    grid = Table(box=box.SIMPLE, header_style="dim", pad_edge=False)
    for column in ("this machine", "", "found", "what it means, or what to do"):
        grid.add_column(column, overflow="fold")
    for row in findings:
        grid.add_row(
            row.name, MARKS[row.status], *map(console.safe_markup, (row.found, row.advice))
        )
    console.out.print(grid)


def _packages() -> Iterator[Finding]:
    """Python and what fintune requires, by the ranges of its own metadata and by the lock."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "ok", f"{platform.python_version()} on {system}")
    wrong = []
    for requirement in _requirements(""):
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found):
            wrong.append(f"{requirement.name} {found or 'absent'} (needs {requirement.specifier})")
    if wrong:
        yield Finding("packages", "missing", ", ".join(wrong), "install again: make demo")
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft"))
    if not wrong:
        yield Finding("packages", "ok", versions)
    lock = Path(__file__).parents[2] / "requirements.lock"
    if lock.is_file():
        pins = re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
        other = [name for name, pin in pins if _version(name) not in (None, pin)]
        here = sum(_version(name) is not None for name, _ in pins)
        said = f"{here} of {len(pins)} installed, {len(other)} of them in another version"
        advice = f"results may differ: {', '.join(other[:5])}" if other else ""
        yield Finding("lock", "note" if other else "ok", said, advice)


def _extras() -> Iterator[Finding]:
    for extra, gives in EXTRAS.items():
        needed = list(_requirements(extra))
        absent = [row.name for row in needed if _version(row.name) is None]
        if needed and not absent:
            yield Finding(f"extra {extra}", "ok", "installed", gives)
            continue
        found = f"without {', '.join(absent)}" if needed else "unknown to this installation"
        yield Finding(f"extra {extra}", "note", found, f"pip install '.[{extra}]' for {gives}")


def _compute() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fast = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), None)
    said = f"bf16 in hardware ({fast})" if fast else "no bf16 in hardware: fp32 is faster"
    yield Finding("CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads", said)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            kind = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16: no bf16 on this GPU"
            yield Finding(f"GPU {index}", "ok", f"{card.name}, {_gb(card.total_memory)}", kind)
    elif Path("/dev/nvidia0").exists():
        fix = "install torch's CUDA build, or a newer driver"
        yield Finding("GPU", "note", f"present, but torch {torch.__version__} does not use it", fix)
    else:
        yield Finding("GPU", "note", "none", "small bases train on the CPU")


def _room() -> Iterator[Finding]:
    memory, shared = _memory(), Path("/dev/shm")
    yield _either("memory", memory >= DEMO_GB * 1e9, _gb(memory), f"the demo needs {DEMO_GB} GB")
    for name, path in (("disk, here", Path.cwd()), ("disk, hub cache", Path(HF_HUB_CACHE))):
        free = free_bytes(path)
        advice = "little for an 8B base; HF_HOME moves the cache"
        yield _either(name, free >= SCRATCH_GB * 1e9, f"{_gb(free)} free", advice)
    if shared.is_dir():
        free = free_bytes(shared)
        advice = "several processes share batches there: docker run --shm-size=2g"
        yield _either("shared memory", free >= 1e9, f"{_gb(free)} free", advice)


def _access() -> Iterator[Finding]:
    for name, there, use in (
        ("hub token", get_token() is not None, "a gated base, such as Llama, needs HF_TOKEN"),
        ("judge key", bool(os.environ.get("OPENAI_API_KEY")), "OPENAI_API_KEY, for a judge alone"),
    ):
        yield _either(name, there, "set" if there else "not set", use)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    yield _either("chromium", bool(chromium), chromium or "none", "tests of the page will skip")


def _nano() -> Finding:
    weights = nano.base_dir() / "model.safetensors"
    try:
        with safe_open(weights, "pt") as file:
            tensors = len(file.keys())
        rows = sum(1 for _ in nano.rows_path().open("rb"))
    except (OSError, SafetensorError) as error:
        return Finding("nano base", "missing", type(error).__name__, "install fintune again")
    return Finding("nano base", "ok", f"{tensors} tensors, {rows:,} sample rows", "make demo")


def _recipe() -> Finding:
    cards = range(torch.cuda.device_count())
    largest = max((torch.cuda.get_device_properties(i).total_memory for i in cards), default=0)
    enough = largest >= RECIPE_GB * 1e9
    found = "this machine can train it" if enough else "not on this machine"
    advice = f"needs one GPU of {RECIPE_GB} GB or more; docs/seed-recipe.md"
    return _either("published 8B recipe", enough, found, advice)


def _either(name: str, good: bool, found: str, advice: str) -> Finding:
    """`ok`, or a note with what to do."""
    return Finding(name, "ok" if good else "note", found, "" if good else advice)


def _requirements(extra: str) -> Iterator[Requirement]:
    """What fintune requires: always (`extra` empty), or for one of its extras alone."""
    for text in importlib.metadata.requires("fintune") or ():
        requirement = Requirement(text)
        for_extra = "extra" in str(requirement.marker or "")
        if bool(extra) == for_extra and (
            requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ):
            yield requirement


def _version(name: str) -> str | None:
    """The installed version without its build tag (+cpu), or None."""
    try:
        return importlib.metadata.version(canonicalize_name(name)).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int:
    """Bytes that this process may use: the machine's memory, or its control group's limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
