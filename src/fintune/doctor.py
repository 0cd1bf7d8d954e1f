"""What this machine can do, and what is missing: `fintune doctor`.

Reads versions from installed metadata and imports torch alone, so that the answer takes about two
seconds. The hub is asked whether its token is good (at most 5 s); no secret is shown.
"""

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from fintune.files import free_bytes
from fintune.hub import token_state

DEMO_GB, BASE_GB = 4, 20
"""Memory that the demo needs; disk that an 8B base needs, whose weights are 16 GB."""


def examine() -> list[dict[str, str]]:
    """A row for every fact: `name`, `status`, `value`, `advice`.

    `status` is ok, note (with what to do in `advice`), or missing: fintune does not work at all.
    """
    return [*_software(), *_hardware()]


def _row(name: str, value: str, advice: str = "", status: str = "note") -> dict[str, str]:
    return {
        "name": name,
        "status": status if advice else "ok",
        "value": value,
        "advice": advice,
    }


def _software() -> Iterator[dict[str, str]]:
    """Python, what fintune requires by its metadata, and its extras."""
    yield _row("python", f"{platform.python_version()} on {platform.system()}")
    needed = [Requirement(text) for text in importlib.metadata.requires("fintune") or ()]
    wrong = [
        f"{row.name} {_version(row.name) or 'absent'} (needs {row.specifier})"
        for row in needed
        if (not row.marker or row.marker.evaluate({"extra": ""}))
        and not row.specifier.contains(_version(row.name) or "0")
    ]
    versions = ", ".join(wrong) or f"torch {_version('torch')}, peft {_version('peft')}"
    yield _row("packages", versions, "install fintune again" if wrong else "", "missing")
    for extra in importlib.metadata.metadata("fintune").get_all("Provides-Extra") or ():
        rows = [row for row in needed if row.marker and row.marker.evaluate({"extra": extra})]
        absent = ", ".join(row.name for row in rows if not _version(row.name))
        state = f"without {absent}" if absent else "installed"
        yield _row(f"extra {extra}", state, f"pip install 'fintune[{extra}]'" if absent else "")


def _hardware() -> Iterator[dict[str, str]]:
    yield _row("CPU", f"{psutil.cpu_count()} cores, {torch.get_num_threads()} threads")
    cards = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    names = ", ".join(f"{card.name} {_gb(card.total_memory)}" for card in cards)
    yield _row("GPU", names or "none that torch uses", "" if cards else "small bases train on CPU")
    memory, free = psutil.virtual_memory().total, free_bytes(Path())
    short = memory < DEMO_GB * 1e9
    yield _row("memory", _gb(memory), f"the demo needs {DEMO_GB} GB" if short else "")
    short = free < BASE_GB * 1e9
    yield _row("disk, here", f"{_gb(free)} free", "little for an 8B base" if short else "")
    yield _row("hub token", *token_state())


def _version(name: str) -> str | None:
    """The installed version without its build tag (+cpu), or None."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
