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
_SCRATCH = 20e9, "little for an 8B base, whose weights are 16 GB; HF_HOME moves the cache"
DISKS = (
    ("disk, here", Path(), *_SCRATCH),
    ("disk, hub cache", Path(HF_HUB_CACHE), *_SCRATCH),
    ("shared memory", Path("/dev/shm"), 1e9, "several processes: docker run --shm-size=2g"),
)
"""Volume, its path, bytes that should be free, what to do where they are not."""


Status = Literal["ok", "note", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact of this machine; only `missing` keeps fintune from working at all."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order a reader wants them: software, hardware, access, abilities."""
    return [*_software(), *_hardware(), *_access()]


def show(findings: list[Finding]) -> None:
    """A line a finding."""
    for row in findings:
        advice = f": {row.advice}" if row.advice else ""
        console.result(f"{row.status:8} {row.name:20} {row.found}{advice}")


def _software() -> Iterator[Finding]:
    """Python, what fintune requires by its own metadata and by the lock, and its extras."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "ok", f"{platform.python_version()} on {system}")
    needed = [Requirement(text) for text in importlib.metadata.requires("fintune") or ()]
    found = {row.name: _version(row.name) for row in needed}
    wrong = [
        f"{row.name} {found[row.name] or 'absent'} (needs {row.specifier})"
        for row in needed
        if _for(row, "") and not row.specifier.contains(found[row.name] or "0")
    ]
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "peft"))
    yield _either(
        "packages", not wrong, ", ".join(wrong) or versions, "install again: make demo", "missing"
    )
    lock = Path(__file__).parents[2] / "requirements.lock"
    if lock.is_file():
        pins = re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
        here = {name: version for name, _ in pins if (version := _version(name))}
        other = [name for name, pin in pins if here.get(name, pin) != pin]
        said = f"{len(here)} of {len(pins)} installed, {len(other)} of them in another version"
        yield _either("lock", not other, said, f"results may differ: {', '.join(other[:5])}")
    for extra, gives in EXTRAS.items():
        absent = [row.name for row in needed if _for(row, extra) and found[row.name] is None]
        advice = f"pip install '.[{extra}]' for {gives}"
        found_here = f"without {', '.join(absent)}" if absent else f"installed, for {gives}"
        yield _either(f"extra {extra}", not absent, found_here, advice)


def _hardware() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fast = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), None)
    said = f"bf16 in hardware ({fast})" if fast else "no bf16 in hardware: fp32 is faster"
    yield Finding("CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads", said)
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for index, card in enumerate(cards):
        kind = "bf16" if card.major >= 8 else "fp16: no bf16 on this GPU"
        yield Finding(f"GPU {index}", "ok", f"{card.name}, {_gb(card.total_memory)}", kind)
    if not cards:
        unused = Path("/dev/nvidia0").exists()
        said = f"present, but torch {torch.__version__} does not use it" if unused else "none"
        fix = "install torch's CUDA build, or a newer driver"
        yield Finding("GPU", "note", said, fix if unused else "small bases train on the CPU")
    memory = _memory()
    yield _either("memory", memory >= DEMO_GB * 1e9, _gb(memory), f"the demo needs {DEMO_GB} GB")
    for name, path, least, advice in DISKS:
        if path.is_dir() or least > 1e9:
            free = free_bytes(path)
            yield _either(name, free >= least, f"{_gb(free)} free", advice)
    enough = any(card.total_memory >= RECIPE_GB * 1e9 for card in cards)
    found = "this machine can train it" if enough else "not on this machine"
    advice = f"needs one GPU of {RECIPE_GB} GB or more; docs/seed-recipe.md"
    yield _either("published 8B recipe", enough, found, advice)


def _access() -> Iterator[Finding]:
    for name, there, use in (
        ("hub token", get_token() is not None, "a gated base, such as Llama, needs HF_TOKEN"),
        ("judge key", bool(os.environ.get("OPENAI_API_KEY")), "OPENAI_API_KEY, for a judge alone"),
    ):
        yield _either(name, there, "set" if there else "not set", use)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    yield _either("chromium", bool(chromium), chromium or "none", "tests of the page will skip")
    try:
        with safe_open(nano.base_dir() / "model.safetensors", "pt") as weights:
            tensors = len(weights.keys())
        rows = sum(1 for _ in nano.rows_path().open("rb"))
        yield Finding("nano base", "ok", f"{tensors} tensors, {rows:,} sample rows")
    except (OSError, SafetensorError) as error:
        yield Finding("nano base", "missing", type(error).__name__, "install fintune again")


def _either(name: str, good: bool, found: str, advice: str, otherwise: Status = "note") -> Finding:
    """`ok`, or what to do."""
    return Finding(name, "ok" if good else otherwise, found, "" if good else advice)


def _for(requirement: Requirement, extra: str) -> bool:
    """Whether fintune requires it always (`extra` empty), or for this extra alone."""
    marker = requirement.marker
    if marker is None or "extra" not in str(marker):
        return not extra and (marker is None or marker.evaluate())
    return marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    """The installed version without its build tag (+cpu), or None."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
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
