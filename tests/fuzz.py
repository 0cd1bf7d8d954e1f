"""Random changes of a good release, by a seed: bytes, JSON values, files exchanged or lost."""

import json
import random
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file
from tiny_release import rewrite_sums

from fintune.files import sha256_file

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 7, 2**70, 1e308, "", "x" * 5000, "\x1b[2J", "../../etc/passwd", "((((",
    [], {}, [[[]]], {"a": {"b": []}}, ["q_proj"] * 3000, {"auto_map": "x.Y"}, "{{ x }}",
)  # fmt: skip


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of a folder; returns what was done, for the message of a failure."""
    name = rng.choice(sorted(path.name for path in folder.iterdir()))
    path = folder / name
    kind = rng.choice(
        ["bit", "cut", "insert", "repeat", "lose", "exchange", "json", "json", "json"]
    )
    data = path.read_bytes()
    at = rng.randrange(max(1, len(data)))
    if kind == "json" and name.endswith(".json"):
        tree = json.loads(data)
        kind += " " + _edit(tree, rng)
        path.write_text(json.dumps(tree))
    elif kind == "lose":
        path.unlink()
    elif kind == "exchange":
        other = rng.choice(sorted(folder.iterdir()))
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[:at])
    elif kind == "insert":
        path.write_bytes(data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:])
    elif kind == "repeat":
        path.write_bytes(data[:at] + data[at : at + 200] * 3 + data[at + 200 :])
    elif data:
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
    return f"{kind} of {name} at {at}"


def redo(folder: Path, source: Path, how: str) -> None:
    """Redo nothing, the lines of SHA256SUMS, or every hash that the folder states of itself."""
    if how == "all":
        rewrite_sums(folder)
    elif how == "sums" and (folder / "SHA256SUMS").exists():
        text = (folder / "SHA256SUMS").read_text(errors="replace")
        for path in source.iterdir():
            if (folder / path.name).exists():
                text = text.replace(sha256_file(path), sha256_file(folder / path.name))
        (folder / "SHA256SUMS").write_text(text)


def meaning(folder: Path) -> dict[str, Any]:
    """What a folder says, whatever its spelling: JSON as values, weights as tensors."""
    said: dict[str, Any] = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        said[path.name] = data
        try:
            if path.suffix == ".json":
                said[path.name] = json.loads(data)
            elif path.suffix == ".safetensors":
                tensors = load_file(path)
                said[path.name] = {name: value.tobytes() for name, value in tensors.items()}
        except (ValueError, SafetensorError):
            pass
    said.pop("SHA256SUMS", None)
    return said


def _edit(tree: Any, rng: random.Random) -> str:
    """Change, remove or add a value somewhere below an object or list; returns its key."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
        return "nothing"
    key = rng.choice(keys)
    if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.6:
        return f"{key}.{_edit(tree[key], rng)}"
    if rng.random() < 0.2:
        del tree[key]
    elif isinstance(tree, dict) and rng.random() < 0.1:
        tree[rng.choice(["auto_map", "x_internal", "added"])] = rng.choice(ODD)
    else:
        tree[key] = rng.choice(ODD)
    return str(key)[:40]
