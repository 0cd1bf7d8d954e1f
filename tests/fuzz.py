"""Random changes by a seed: of a good release, of rows and of questions."""

import json
import random
from collections.abc import Sequence
from copy import deepcopy
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


# ---- rows and questions --------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *ODD, 1.5, -0.0, float("nan"), float("inf"), "#N/A", "not json [", "\ud800", "EUR 2019m",
    '[{"role": "user"}]', "-" * 3000, [None], [[[]], {}],
    [{"type": "text", "text": "a part"}], [{"type": "image_url"}], [["q", "a"]], [["q"]], ["a", 1],
    {"type": "text"}, {"role": "user", "content": "q"}, "User: a\nAssistant: b\nUser: c",
    "[" + "-" * 3000 + "1]", "['a', b'\\d']", "['" + "(" * 500,
)  # fmt: skip
KEYS = (
    "weight", "train", "loss_mask", "history", "messages", "conversations", "system", "tool_calls",
    "function_call", "reasoning_content", "content", "role", "from", "value", "tools", "answer",
    "prompt", "choices", "kind", "id", "context_id", "question", "text", "", "function",
)  # fmt: skip


def changed(row: dict[str, Any], rng: random.Random, keys: Sequence[str] = KEYS) -> dict[str, Any]:
    """A copy of a row with a few values, keys or nested values exchanged, added or lost.

    Args:
        keys: that may be added.
    """
    made: dict[str, Any] = json.loads(json.dumps(row))
    for _ in range(rng.randrange(4) if made else 0):
        place: Any = made
        while isinstance(place, dict | list) and place and rng.random() < 0.7:
            inner = rng.choice(list(place.values()) if isinstance(place, dict) else place)
            if not isinstance(inner, dict | list):
                break
            place = inner
        key = rng.choice((list(place) if isinstance(place, dict) else [*range(len(place))]) or [0])
        value = deepcopy(rng.choice(VALUES))
        if isinstance(place, list):
            place[key : key + rng.randrange(2)] = [value]
        elif rng.random() < 0.2:
            place.pop(key, None)
        else:
            place[rng.choice(keys) if rng.random() < 0.4 else key] = value
    return made


def line(row: dict[str, Any], rng: random.Random, keys: Sequence[str] = KEYS) -> bytes:
    """A changed row as a line of JSON, now and then with damaged bytes; no line end in it."""
    cells = {
        k: json.dumps(v) if rng.random() < 0.1 else v for k, v in changed(row, rng, keys).items()
    }
    data = json.dumps(cells, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        at, odd = rng.randrange(len(data)), rng.randbytes(3).replace(b"\n", b"").replace(b"\r", b"")
        data = rng.choice([data[:at], data[:at] + odd + data[at:], data + b",", data + data])
    return data or b"{}"
