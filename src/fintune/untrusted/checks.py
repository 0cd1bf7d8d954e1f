"""What a folder's bytes say, before torch or transformers see any of it.

Only regular files are opened, never through a link, with a bound on their size. JSON is parsed
with bounded depth and without duplicate keys, templates are read as Jinja tokens, weights as the
header and the bits of a safetensors file. `static_checks` stops at the first stage that fails.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from pydantic import ValidationError

from fintune.errors import GateRefused
from fintune.files import read_toml
from fintune.untrusted.schemas import SCHEMAS

Role = Literal["release", "adapter", "base"]
"""A release of ours (an allow-list of names), any peft folder, a base model."""

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FIXTURE = "prompt_fixture.json"
SUMS = "SHA256SUMS"
TRAINING_ARGS = "training_args.bin"
TEMPLATE = "chat_template.jinja"
_LIMITS: dict[str, Any] = read_toml(__file__, "limits.toml")
ALLOWED, PICKLES = frozenset(_LIMITS["release_names"]), frozenset(_LIMITS["pickles"])
_SMALL = 2**20
"""Bytes of a text file that has no bound of its own in limits.toml."""
_HEADER = 100_000_000
"""Bytes of a safetensors header, the format's own bound."""
_DEPTH = 64
_ENTRIES = 10_000
_PATH = re.compile(r"""(?<![\w./:~-])(?:/(?:home|Users|root|tmp)/[\w.-]+|[A-Za-z]:\\+Users\\+\w)""")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUM_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")
_IMPLEMENTATION = re.compile(r"[a-z0-9_|]*")
_EXPONENTS = {"F64": (8, 52, 11), "F32": (4, 23, 8), "F16": (2, 10, 5), "BF16": (2, 7, 8)}
"""Floating types of an adapter: bytes, bits of the mantissa, bits of the exponent."""


class Unreadable(Exception):
    """A file that is not opened, or not what its name says; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a folder and its answer; a `note` informs and never fails."""

    name: str
    status: Literal["ok", "failed", "note"]
    detail: str

    @staticmethod
    def of(name: str, problem: str, good: str) -> "Check":
        """Failed for a problem; ok, with what is good, where there is none."""
        return Check(name, "failed", problem) if problem else Check(name, "ok", good)


@dataclass(slots=True)
class Report:
    """Every check of one folder, in the order they ran."""

    folder: Path
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that refuse the folder."""
        return [check for check in self.checks if check.status == "failed"]

    def run(self, stage: Callable[[], Iterable[Check]]) -> None:
        """Add a stage's checks, unless an earlier stage failed."""
        if not self.failed:
            self.checks += stage()

    def settle(self) -> None:
        """Raise GateRefused naming each failed check, if there is one."""
        if self.failed:
            raise GateRefused(
                f"{self.folder.name} is refused: "
                + "; ".join(f"{check.name}: {check.detail}" for check in self.failed),
                why="a folder that fails a check may answer differently, or run code, elsewhere",
                fix="get it again from its source; a release of your own: fintune release",
            )


def static_checks(folder: Path, role: Role, *, no_pickle: bool = False) -> list[Check]:
    """Everything that can be said about a folder from its bytes alone.

    Args:
        no_pickle: also refuse `training_args.bin`, which is otherwise allowed in a release by
            name and checksum and never opened.
    """
    report = Report(folder)
    report.run(lambda: _check_files(folder, role, no_pickle=no_pickle))
    if role == "release":
        report.run(lambda: _check_sums(folder))
    report.run(lambda: _check_configs(folder, role))
    report.run(lambda: [_check_template(folder)])
    if role == "base":
        report.run(lambda: _check_base_weights(folder))
    else:
        report.run(lambda: check_weights(folder))
    return report.checks


def open_file(folder: Path, name: str) -> BufferedReader:
    """Open a regular file of a folder without following links.

    One exception: a link of a hub cache's snapshot to a file in the `blobs` of its repository.

    Raises:
        Unreadable: absent, a link, a device, a FIFO, a folder, or not permitted.
    """
    path = folder / name
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if path.is_symlink():
            path = _blob(folder, name)
        handle = os.open(path, flags)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = (error.strerror if isinstance(error, OSError) else None) or "no file name"
        raise Unreadable(f"{name} cannot be opened: {reason}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unreadable(f"{name} is no regular file")
    return os.fdopen(handle, "rb")


def read_text(folder: Path, name: str) -> str:
    """A file's UTF-8 text within its bound (limits.toml). Raises Unreadable."""
    limit = _LIMITS["bytes"].get(name, _SMALL)
    with open_file(folder, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Unreadable(f"{name} is larger than {limit:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable(f"{name} is not UTF-8") from None


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of bounded depth that holds no key twice. Raises Unreadable."""
    try:
        tree = json.loads(
            read_text(folder, name), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise Unreadable(f"{name} is not JSON: {reason}") from None
    if not isinstance(tree, dict):
        raise Unreadable(f"{name} is no JSON object")
    if _deeper(tree, _DEPTH):
        raise Unreadable(f"{name} is nested deeper than {_DEPTH}")
    return tree


def check_weights(folder: Path) -> Iterator[Check]:
    """Finite, non-empty LoRA tensors whose B matrices are not all zero; read without torch."""
    try:
        tensors = read_header(folder, ADAPTER)
        with open_file(folder, ADAPTER) as file:
            found = {name: _bits(file, tensor) for name, tensor in tensors.items()}
    except Unreadable as error:
        yield Check("weights", "failed", str(error))
        return
    lora_b = [name for name in found if "lora_B" in name]
    empty = [name for name, tensor in tensors.items() if tensor.count == 0]
    infinite = [name for name, (finite, _) in found.items() if not finite]
    zero = [name for name in lora_b if not found[name][1]]
    if not lora_b or empty:
        yield Check("weights", "failed", f"empty: {some(empty) or 'no LoRA tensors'}")
    elif infinite:
        yield Check("weights", "failed", f"NaN or infinite: {some(infinite)}")
    elif len(zero) == len(lora_b):
        yield Check("weights", "failed", "every B matrix is zero: the adapter changes nothing")
    else:
        parameters = sum(tensor.count for tensor in tensors.values())
        yield Check("weights", "ok", f"{len(tensors)} finite tensors, {parameters:,} parameters")
        if zero:
            yield Check("weights", "note", f"{len(zero)} of {len(lora_b)} B matrices are zero")


def check_paths(folder: Path, private: list[str]) -> Check:
    """No file names a folder of the machine that built it.

    Args:
        private: absolute folders of this build; found literally, in any file. Home folders of
            others are found by their form, in every text file but the tokenizer's vocabulary.
    """
    hits = []
    for path in sorted(folder.iterdir()):
        with open_file(folder, path.name) as file:
            data = file.read()
        text = "" if path.name in {ADAPTER, "tokenizer.json"} else data.decode("utf-8", "replace")
        found = next((name for name in private if name.encode() in data), None)
        match = _PATH.search(text)
        if found or match:
            hits.append(f"{path.name} ({found or (match and match.group())})")
    found_in = f"a local path in {', '.join(hits)}" if hits else ""
    return Check.of("paths", found_in, "no local path in any file")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header; `begin` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))


def read_header(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name: known types, sizes that fit, no gap, no overlap.

    Raises:
        Unreadable: with what is wrong.
    """
    try:
        with open_file(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER, size - 8):
                raise ValueError("its header is cut or too long")
            tree = json.loads(file.read(length), object_pairs_hook=_unique)
        tree.pop("__metadata__", None)
        tensors = {key: _tensor(value, 8 + length) for key, value in tree.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{name} is not readable safetensors ({str(error)[:100]})") from None
    at = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != at:
            raise Unreadable(f"{name} is not readable safetensors (a gap or overlap at byte {at})")
        at = tensor.end
    if at != size:
        raise Unreadable(f"{name} is cut: {size:,} bytes where its header names {at:,}")
    return tensors


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> sha256 as SHA256SUMS lists them (`sha256sum`, also with -b). Raises Unreadable.

    Empty where there is no SHA256SUMS.
    """
    if not (folder / SUMS).exists():
        return {}
    sums = {}
    for line in read_text(folder, SUMS).splitlines():
        match = _SUM_LINE.fullmatch(line.rstrip())
        if match is None or match.group(2) in sums:
            raise Unreadable(f"{SUMS} has a line that is none of sha256sum: {line[:80]!r}")
        sums[match.group(2)] = match.group(1)
    return sums


def some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_files(folder: Path, role: Role, *, no_pickle: bool) -> Iterator[Check]:
    """Regular files; of a release only names of the allow-list, no pickle without a checksum."""
    names = sorted(path.name for path in islice(folder.iterdir(), _ENTRIES))
    needed = ("config.json",) if role == "base" else (ADAPTER, ADAPTER_CONFIG)
    read = names
    if role != "release":
        known = {*_LIMITS["loaded_json"], TEMPLATE}
        read = [name for name in names if name in known or name.endswith(".safetensors")]
    odd = []
    for name in read:
        try:
            open_file(folder, name).close()
        except Unreadable as error:
            odd.append(str(error))
    problems = {"missing": [name for name in needed if name not in names], "no plain file": odd}
    if role == "release":
        pickles = [
            name for name in names if Path(name).suffix.lower() in PICKLES and name != TRAINING_ARGS
        ]
        problems["reading it can run code"] = pickles
        problems["not in the allow-list"] = [n for n in names if n not in {*ALLOWED, *pickles}]
        if no_pickle and TRAINING_ARGS in names:
            problems["a pickle (--no-pickle)"] = [TRAINING_ARGS]
    if role == "base" and ADAPTER_CONFIG in names:
        problems["an adapter, no base"] = [ADAPTER_CONFIG]
    for what, which in problems.items():
        if which:
            name = "pickle" if "code" in what else "files"
            yield Check(name, "failed", f"{what}: {some(which)}")
    if not any(problems.values()):
        good = f"{len(read)} files" + (", all in the allow-list" if role == "release" else "")
        yield Check("files", "ok", good)
    if role == "release" and TRAINING_ARGS in names and not no_pickle:
        yield Check("pickle", "note", f"{TRAINING_ARGS} is a pickle; it is never opened")


def _check_sums(folder: Path) -> Iterator[Check]:
    """SHA256SUMS names every file, and every file has the hash it names."""
    try:
        sums = read_sums(folder)
    except Unreadable as error:
        yield Check("checksums", "failed", str(error))
        return
    present = {path.name for path in folder.iterdir()} - {SUMS}
    if not sums:
        status: Literal["failed", "note"] = "failed" if TRAINING_ARGS in present else "note"
        of_pickle = f", and {TRAINING_ARGS} is a pickle" if status == "failed" else ""
        yield Check("checksums", status, f"no {SUMS}: a change cannot be noticed{of_pickle}")
        return
    listed = sorted(present & sums.keys())
    changed = [name for name in listed if _sha256(folder, name) != sums[name]]
    problems = [f"changed: {some(changed)}"] if changed else []
    problems += [f"missing: {name}" for name in sorted(sums.keys() - present)]
    problems += [f"not listed: {name}" for name in sorted(present - sums.keys())]
    yield Check.of("checksums", some(problems), f"{len(sums)} files as listed")


def _check_configs(folder: Path, role: Role) -> Iterator[Check]:
    """JSON that is JSON, of the expected types, that names no code."""
    problems: list[str] = []
    hooks: list[str] = []
    ignored: list[str] = []
    present = {path.name for path in islice(folder.iterdir(), _ENTRIES)}
    read = {name for name in present if name.endswith(".json")}
    if role != "release":
        read &= set(_LIMITS["loaded_json"])
    for name in sorted(read):
        try:
            tree = read_object(folder, name)
            if name in SCHEMAS:
                SCHEMAS[name].model_validate(tree)
        except Unreadable as error:
            problems.append(str(error))
            continue
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part)[:80] for part in first["loc"])
            problems.append(f"{name}: {at}: {first['msg']}")
            continue
        if name not in _LIMITS["vocabularies"]:
            for key in _hooks(tree):
                found = ignored if role == "base" and key == "auto_map" else hooks
                found.append(f"{name}: {key}")
        if name == ADAPTER_CONFIG:
            yield from _check_adapter_config(tree, role)
    yield Check.of("config", some(problems), f"{len(read)} JSON files")
    asked = f"asks to import code ({some(hooks)})" if hooks else ""
    yield Check.of("code hooks", asked, "no configuration names code")
    if ignored:
        yield Check("code hooks", "note", f"names code that is never imported ({some(ignored)})")


def _check_adapter_config(config: dict[str, Any], role: Role) -> Iterator[Check]:
    base = config.get("base_model_name_or_path")
    if role != "release":
        return
    if not isinstance(base, str) or not _HUB_ID.fullmatch(base):
        yield Check("base", "failed", f"base_model_name_or_path is {base!r}: no public model id")
    elif not config.get("revision"):
        yield Check("base", "note", f"{base}, revision not recorded")


def _check_template(folder: Path) -> Check:
    """A chat template is a program: it may reach for messages, not for Python's internals.

    Read as Jinja tokens and never run here. transformers' sandbox, in which it is rendered later,
    is a second wall (CVE-2026-5760 is a server that had neither).
    """
    try:
        texts = [read_text(folder, TEMPLATE)] if (folder / TEMPLATE).exists() else []
        for name in ("tokenizer_config.json", "chat_template.json"):
            inline = read_object(folder, name) if (folder / name).exists() else {}
            texts += _inline_templates(inline.get("chat_template"))
    except Unreadable as error:
        return Check("template", "failed", str(error))
    for text in texts:
        try:
            reaches = template_reaches(text)
        except (jinja2.TemplateError, RecursionError) as error:
            return Check("template", "failed", f"not a Jinja template: {str(error)[:100]}")
        if reaches:
            return Check("template", "failed", f"reaches for {reaches}")
    return Check("template", "ok" if texts else "note", "" if texts else "no chat template")


def _inline_templates(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    rows = value if isinstance(value, list) else []
    if isinstance(value, dict):
        rows = [{"template": text} for text in value.values()]
    return [str(row["template"]) for row in rows if isinstance(row, dict) and row.get("template")]


def _check_base_weights(folder: Path) -> Iterator[Check]:
    """Headers of the weights; their bytes are read once, by torch."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    try:
        counts = [len(read_header(folder, name)) for name in names]
    except Unreadable as error:
        yield Check("weights", "failed", str(error))
        return
    if names:
        yield Check("weights", "ok", f"{sum(counts)} tensors in {len(names)} files")


def _blob(folder: Path, name: str) -> Path:
    """Where a link of a hub cache's snapshot ends, if that is a blob of the same repository."""
    snapshot = folder.absolute()
    target = (folder / name).resolve()
    blobs = snapshot.parent.parent / "blobs"
    if snapshot.parent.name != "snapshots" or target.parent != blobs.resolve():
        raise Unreadable(f"{name} is a link")
    return target


def _sha256(folder: Path, name: str) -> str:
    with open_file(folder, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor(value: Any, start: int) -> Tensor:
    begin, end = value["data_offsets"]
    tensor = Tensor(value["dtype"], tuple(value["shape"]), start + begin, start + end)
    if tensor.dtype not in _LIMITS["dtypes"]:
        raise ValueError(f"unknown type {tensor.dtype!r}")
    sizes = (*tensor.shape, begin, end)
    if len(sizes) > 10 or any(type(n) is not int or not 0 <= n < 2**48 for n in sizes):
        raise ValueError("a size that no tensor has")
    if tensor.count * _LIMITS["dtypes"][tensor.dtype] != end - begin:
        raise ValueError("a tensor's bytes do not fit its shape")
    return tensor


def _bits(file: BufferedReader, tensor: Tensor) -> tuple[bool, bool]:
    """Whether every element is finite, and whether any is not zero."""
    if tensor.dtype not in _EXPONENTS:
        raise Unreadable(f"{ADAPTER} holds {tensor.dtype}, which no adapter is trained in")
    size, mantissa, exponent = _EXPONENTS[tensor.dtype]
    mask = np.array(((1 << exponent) - 1) << mantissa, dtype=f"<u{size}")
    finite, any_set, left = True, False, tensor.end - tensor.begin
    file.seek(tensor.begin)
    while left:
        bits = np.frombuffer(file.read(min(left, 2**24)), dtype=mask.dtype)
        left -= bits.nbytes
        finite = finite and not bool(((bits & mask) == mask).any())
        any_set = any_set or bool((bits << np.array(1, mask.dtype)).any())
    return finite, any_set


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key stands twice")
    return tree


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _deeper(tree: Any, depth: int) -> bool:
    if not isinstance(tree, dict | list):
        return False
    values = tree.values() if isinstance(tree, dict) else tree
    return depth == 0 or any(_deeper(value, depth - 1) for value in values)


def _hooks(tree: Any) -> Iterator[str]:
    """Keys that name code to import, at any depth."""
    if isinstance(tree, list):
        for value in tree:
            yield from _hooks(value)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            kernel = key.endswith("_implementation") and not _IMPLEMENTATION.fullmatch(str(value))
            if value and (key in _LIMITS["hooks"] or key.endswith("_internal") or kernel):
                yield key
            if key == "quantization_config" and isinstance(value, dict):
                method = value.get("quant_method", "bitsandbytes")
                if method not in _LIMITS["quantizations"]:
                    yield f"quant_method {method!r}"
            yield from _hooks(value)


def template_reaches(source: str) -> str:
    """The first thing in a template's code that no chat template needs, or nothing."""
    last = ""
    for _, kind, value in jinja2.Environment().lex(source):
        if kind in {"name", "string"} and "__" in value:
            return value.strip("'\"")
        if kind == "name" and last == "." and value.startswith("_"):
            return value
        if kind == "name" and last == "|" and value == "attr":
            return "the attr filter"
        if kind == "name" and last == "{%" and value in _LIMITS["template_tags"]:
            return f"{{% {value} %}}"
        if kind != "whitespace":
            last = value.rstrip("-+") if kind == "block_begin" else value
    return ""
