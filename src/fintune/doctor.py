"""What this machine can do, and what is missing: `fintune doctor`.

Reads versions from installed metadata and imports torch alone, so that the answer takes about two
seconds. A secret is reported as set or not set, never by its value.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from fintune import console, nano
from fintune.files import free_bytes

EXTRAS = {
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
DISK_GB = 20
"""Free space for an 8B base, whose weights are 16 GB."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact of this machine; only `missing` keeps fintune from working at all."""

    name: str
    status: Literal["ok", "note", "missing"]
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


def _either(name: str, good: bool, found: str, advice: str) -> Finding:
    """`ok`, or a note of what to do."""
    return Finding(name, "ok" if good else "note", found, "" if good else advice)


def _software() -> Iterator[Finding]:
    """Python, what fintune requires by its own metadata, and its extras."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "ok", f"{platform.python_version()} on {system}")
    needed = [Requirement(text) for text in importlib.metadata.requires("fintune") or ()]
    found = {row.name: _version(row.name) for row in needed}
    always = [row for row in needed if row.marker is None or row.marker.evaluate({"extra": ""})]
    wrong = [
        f"{row.name} {found[row.name] or 'absent'} (needs {row.specifier})"
        for row in always
        if not row.specifier.contains(found[row.name] or "0")
    ]
    if wrong:
        yield Finding("packages", "missing", ", ".join(wrong), "install again: make demo")
    else:
        versions = (f"{name} {found[name]}" for name in ("torch", "transformers", "peft"))
        yield Finding("packages", "ok", ", ".join(versions))
    for extra, gives in EXTRAS.items():
        rows = [row for row in needed if row.marker and row.marker.evaluate({"extra": extra})]
        absent = [row.name for row in rows if row not in always and found[row.name] is None]
        here = f"without {', '.join(absent)}" if absent else f"installed, for {gives}"
        yield _either(f"extra {extra}", not absent, here, f"pip install '.[{extra}]' for {gives}")


def _hardware() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    can = torch.cpu.get_capabilities()
    fast = next((flag for flag in ("amx_bf16", "avx512_bf16") if can.get(flag)), None)
    said = f"bf16 in hardware ({fast})" if fast else "no bf16 in hardware: fp32 is faster"
    yield Finding("CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads", said)
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for index, card in enumerate(cards):
        kind = "bf16" if card.major >= 8 else "fp16: no bf16 on this GPU"
        yield Finding(f"GPU {index}", "ok", f"{card.name}, {_gb(card.total_memory)}", kind)
    if not cards and Path("/dev/nvidia0").exists():
        said = f"present, but torch {torch.__version__} does not use it"
        yield Finding("GPU", "note", said, "install torch's CUDA build, or a newer driver")
    elif not cards:
        yield Finding("GPU", "note", "none", "small bases train on the CPU")
    memory = psutil.virtual_memory().total
    yield _either("memory", memory >= DEMO_GB * 1e9, _gb(memory), f"the demo needs {DEMO_GB} GB")
    for name, path in (("disk, here", Path()), ("disk, hub cache", Path(HF_HUB_CACHE))):
        free, advice = free_bytes(path), "little for an 8B base of 16 GB; HF_HOME moves the cache"
        yield _either(name, free >= DISK_GB * 1e9, f"{_gb(free)} free", advice)
    enough = any(card.total_memory >= RECIPE_GB * 1e9 for card in cards)
    said = "this machine can train it" if enough else "not on this machine"
    advice = f"needs one GPU of {RECIPE_GB} GB or more; docs/seed-recipe.md"
    yield _either("published 8B recipe", enough, said, advice)


def _access() -> Iterator[Finding]:
    for name, secret, use in (
        ("hub token", get_token(), "a gated base, such as Llama, needs HF_TOKEN"),
        ("judge key", os.environ.get("OPENAI_API_KEY"), "OPENAI_API_KEY, for a judge alone"),
    ):
        yield _either(name, bool(secret), "set" if secret else "not set", use)
    if (nano.base_dir() / "model.safetensors").is_file():
        yield Finding("nano base", "ok", "installed")
    else:
        yield Finding("nano base", "missing", "no weights", "install fintune again")


def _version(name: str) -> str | None:
    """The installed version without its build tag (+cpu), or None."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
