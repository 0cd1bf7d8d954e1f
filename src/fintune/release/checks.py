"""Checks on a release folder that run before anything in it is loaded.

`bundle` runs them on what it is about to publish, `verify` on what it was given. Nothing here
unpickles, imports or renders: files are listed, hashed, parsed as JSON, as Jinja tokens and as
safetensors. Order matters: `verify` loads a folder only when all of these passed.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from fintune.errors import GateRefused
from fintune.files import read_toml, sha256_file
from fintune.model import Base, trained_revision

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FIXTURE = "prompt_fixture.json"
SUMS = "SHA256SUMS"
TRAINING_ARGS = "training_args.bin"
TEMPLATE = "chat_template.jinja"
_LISTS: dict[str, list[str]] = read_toml(__file__, "allowed.toml")
ALLOWED, PICKLES = frozenset(_LISTS["names"]), frozenset(_LISTS["pickles"])
_PATH = re.compile(r"""(?<![\w./:~-])(?:/(?:home|Users|root|tmp)/[\w.-]+|[A-Za-z]:\\+Users\\+\w)""")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""A commit of the hub, or the sha256 of a local base's weights; only like is held against like."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a release and its answer; a `note` informs and never fails."""

    name: str
    status: Literal["ok", "failed", "note"]
    detail: str

    @staticmethod
    def of(name: str, problem: str, good: str) -> "Check":
        """Failed for a problem; ok, with what is good, where there is none."""
        return Check(name, "failed", problem) if problem else Check(name, "ok", good)


@dataclass(slots=True)
class Report:
    """Every check of one release folder, in the order they ran."""

    folder: Path
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that refuse the folder."""
        return [check for check in self.checks if check.status == "failed"]

    def settle(self) -> None:
        """Raise GateRefused naming each failed check, if there is one."""
        if self.failed:
            raise GateRefused(
                f"{self.folder.name} is refused: "
                + "; ".join(f"{check.name}: {check.detail}" for check in self.failed),
                why="a release that fails a check may answer differently, or run code, elsewhere",
                fix="build it again from its run (fintune release), or get it from its source",
            )


def static_checks(folder: Path, *, no_pickle: bool = False) -> Iterator[Check]:
    """Everything that can be said about a folder from its bytes alone."""
    yield from check_files(folder, no_pickle=no_pickle)
    yield from check_sums(folder)
    yield from check_configs(folder)
    yield check_template(folder)
    yield from check_weights(folder)


def check_files(folder: Path, *, no_pickle: bool) -> Iterator[Check]:
    """The allow-list: plain files only, no pickle but `training_args.bin` with a checksum."""
    found = sorted(folder.iterdir())
    odd = [path.name for path in found if path.is_symlink() or not path.is_file()]
    pickles = [p.name for p in found if p.suffix.lower() in PICKLES and p.name != TRAINING_ARGS]
    unknown = [p.name for p in found if p.name not in ALLOWED and p.name not in {*odd, *pickles}]
    missing = [name for name in (ADAPTER, ADAPTER_CONFIG) if not (folder / name).is_file()]
    wrong = {"no plain file": odd, "not in the allow-list": unknown, "missing": missing}
    for what, names in wrong.items():
        if names:
            yield Check("files", "failed", f"{what}: {', '.join(names)}")
    if not odd + unknown + missing:
        yield Check("files", "ok", f"{len(found)} files, all in the allow-list")
    if pickles:
        yield Check("pickle", "failed", f"reading it can run code: {', '.join(pickles)}")
    if (folder / TRAINING_ARGS).is_file():
        if no_pickle:
            yield Check("pickle", "failed", f"{TRAINING_ARGS} is a pickle (--no-pickle)")
        elif TRAINING_ARGS not in _sums(folder):
            yield Check("pickle", "failed", f"{TRAINING_ARGS} is a pickle without a checksum")
        else:
            yield Check("pickle", "note", f"{TRAINING_ARGS} is a pickle; it was never opened")


def check_sums(folder: Path) -> Iterator[Check]:
    """SHA256SUMS names every file, and every file has the hash it names."""
    sums = _sums(folder)
    if not sums:
        yield Check("checksums", "note", f"no {SUMS}: a changed byte cannot be noticed")
        return
    present = {path.name for path in folder.iterdir() if path.is_file()} - {SUMS}
    changed = [n for n in sorted(present & sums.keys()) if sha256_file(folder / n) != sums[n]]
    problems = [f"changed: {', '.join(changed)}"] if changed else []
    problems += [f"missing: {name}" for name in sorted(sums.keys() - present)]
    problems += [f"not listed: {name}" for name in sorted(present - sums.keys())]
    yield Check.of("checksums", "; ".join(problems), f"{len(sums)} files as listed")


def check_configs(folder: Path) -> Iterator[Check]:
    """JSON that is JSON, names no code, and an adapter_config that any machine can use."""
    trees: dict[str, Any] = {}
    broken = []
    for path in sorted(folder.glob("*.json")):
        try:
            trees[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            broken.append(path.name)
    if broken:
        yield Check("config", "failed", f"not JSON: {', '.join(broken)}")
    configs = {name: tree for name, tree in trees.items() if name != "tokenizer.json"}
    hooks = [f"{name}: {key}" for name, tree in configs.items() for key in _hooks(tree)]
    asked = f"asks to import code ({', '.join(hooks)})" if hooks else ""
    yield Check.of("code hooks", asked, "no configuration names code")
    config = trees.get(ADAPTER_CONFIG)
    if not isinstance(config, dict):
        return
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if config.get("peft_type") != "LORA":
        yield Check("config", "failed", f"peft_type is {config.get('peft_type')!r}, not LORA")
    if not isinstance(base, str) or not _HUB_ID.fullmatch(base):
        yield Check("base", "failed", f"base_model_name_or_path is {base!r}: no public model id")
    elif not revision:
        yield Check("base", "note", f"{base}, revision not recorded")


def check_template(folder: Path) -> Check:
    """A chat template is a program: it may reach for messages, not for Python's internals.

    Read as Jinja tokens and never run. The sandbox it is rendered in later is a second wall
    (CVE-2026-5760 is a server that had neither).
    """
    path = folder / TEMPLATE
    texts = [path.read_text(encoding="utf-8", errors="replace")] if path.is_file() else []
    inline = _object(folder / "tokenizer_config.json").get("chat_template")
    rows = inline if isinstance(inline, list) else [{"template": inline}]
    texts += [row["template"] for row in rows if isinstance(row, dict) and row.get("template")]
    for text in texts:
        try:
            reaches = _template_reaches(str(text))
        except jinja2.TemplateSyntaxError as error:
            return Check("template", "failed", f"not a Jinja template: {error.message}")
        if reaches:
            return Check("template", "failed", f"reaches for {reaches}")
    return Check("template", "ok" if texts else "note", "" if texts else "no chat template")


def check_weights(folder: Path) -> Iterator[Check]:
    """Finite, non-empty LoRA tensors whose B matrices are not all zero."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        yield Check("weights", "failed", f"{ADAPTER} is not readable safetensors ({error})")
        return
    lora_b = {name: value for name, value in tensors.items() if "lora_B" in name}
    empty = [name for name, value in tensors.items() if value.numel() == 0]
    infinite = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    zero = [name for name, value in lora_b.items() if not value.any()]
    if not lora_b or empty:
        yield Check("weights", "failed", f"empty: {_some(empty) or 'no LoRA tensors'}")
    elif infinite:
        yield Check("weights", "failed", f"NaN or infinite: {_some(infinite)}")
    elif len(zero) == len(lora_b):
        yield Check("weights", "failed", "every B matrix is zero: the adapter changes nothing")
    else:
        parameters = sum(value.numel() for value in tensors.values())
        yield Check("weights", "ok", f"{len(tensors)} finite tensors, {parameters:,} parameters")
        if zero:
            yield Check("weights", "note", f"{len(zero)} of {len(lora_b)} B matrices are zero")


def check_base(folder: Path, base: Base) -> Iterator[Check]:
    """The adapter is of this base: same revision, and peft's own keys and shapes for it.

    The expected tensors come from peft on an empty copy of the base (torch's meta device), so no
    weight of the base is read.
    """
    revision = trained_revision(folder)
    comparable = _REVISION.fullmatch(revision) and len(revision) == len(base.revision)
    if comparable and revision != base.revision:
        found = f"revision {revision[:12]}, this base is {base.revision[:12]}"
        yield Check("base", "failed", f"trained on another base ({found})")
    elif comparable:
        yield Check("base", "ok", f"{base.id} at {revision[:12]}")
    elif revision:
        yield Check("base", "note", f"trained on {revision[:12]}; not comparable with this folder")
    try:
        expected = _expected_tensors(folder, base)
    except (ValueError, TypeError, KeyError) as error:
        yield Check("keys", "failed", f"peft cannot place it on {base.id}: {str(error)[:200]}")
        return
    with safe_open(folder / ADAPTER, "pt") as file:
        found_shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    problems = [f"missing key {name}" for name in sorted(expected.keys() - found_shapes.keys())]
    problems += [f"extra key {name}" for name in sorted(found_shapes.keys() - expected.keys())]
    problems += [
        f"{name} is {found_shapes[name]}, the base needs {shape}"
        for name, shape in sorted(expected.items())
        if found_shapes.get(name, shape) != shape
    ]
    good = f"{len(expected)} keys and shapes as the base needs them"
    yield Check.of("keys", _some(problems), good)


def check_paths(folder: Path, private: list[str]) -> Check:
    """No file names a folder of the machine that built it.

    Args:
        private: absolute folders of this build; found literally, in any file. Home folders of
            others are found by their form, in every text file but the tokenizer's vocabulary.
    """
    hits = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        text = "" if path.name in {ADAPTER, "tokenizer.json"} else data.decode("utf-8", "replace")
        found = next((name for name in private if name.encode() in data), None)
        match = _PATH.search(text)
        if found or match:
            hits.append(f"{path.name} ({found or (match and match.group())})")
    found_in = f"a local path in {', '.join(hits)}" if hits else ""
    return Check.of("paths", found_in, "no local path in any file")


def _expected_tensors(folder: Path, base: Base) -> dict[str, tuple[int, ...]]:
    architecture = AutoConfig.from_pretrained(base.folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
        peft = get_peft_model(model, LoraConfig.from_pretrained(folder), low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(peft, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in state.items()}


def _template_reaches(source: str) -> str:
    """The first thing in a template's code that no chat template needs, or nothing."""
    last = ""
    for _, kind, value in jinja2.Environment().lex(source):
        if kind in {"name", "string"} and "__" in value:
            return value.strip("'\"")
        if kind == "name" and last == "." and value.startswith("_"):
            return value
        if kind == "name" and last == "|" and value == "attr":
            return "the attr filter"
        if kind == "name" and last == "{%" and value in _LISTS["template_tags"]:
            return f"{{% {value} %}}"
        if kind != "whitespace":
            last = value.rstrip("-+") if kind == "block_begin" else value
    return ""


def _hooks(tree: Any) -> Iterator[str]:
    if isinstance(tree, list):
        for value in tree:
            yield from _hooks(value)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if value and (key in _LISTS["hooks"] or key.endswith("_internal")):
                yield key
            yield from _hooks(value)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _sums(folder: Path) -> dict[str, str]:
    """File name -> sha256 as SHA256SUMS lists them (the format of `sha256sum`)."""
    if not (folder / SUMS).is_file():
        return {}
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("  ") for line in lines if line.strip())
    return {name.strip().lstrip("*"): digest for digest, _, name in pairs}


def _some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
