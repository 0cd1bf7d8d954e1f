"""Static checks: of a folder's bytes, before torch or transformers read any of them.

JSON is searched for keys that name code, templates are lexed, weights are read as bit patterns, and
the hashes in a release's files are compared with the files: `training_config.json` states the
sha256 of what the release was made from (`provenance`) and of every file beside it (`files`), the
card that of `training_config.json`, and the verdict. A changed file thus contradicts another file,
also where its line in SHA256SUMS was changed too.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np

from fintune.console import some
from fintune.untrusted import checks
from fintune.untrusted.checks import LIMITS, Check, Note, Report, Unreadable, ask, refuse

Role = Literal["release", "adapter", "base"]
"""A release of fintune (only allowed names), any folder of peft, or a base model."""
_SHARD = re.compile(r"[^/\\]+\.safetensors")
_PATH = re.compile(r"""(?<![\w./:~-])(?:/(?:home|Users|root|tmp)/[\w.-]+|[A-Za-z]:\\+Users\\+\w)""")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUM_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")
"""Of `sha256sum`, also with -b."""
_VERDICT = re.compile(r"Verdict: \*\*([^*]*)\*\*")
_CONFIG_SHA256 = re.compile(rf"`{re.escape(checks.CONFIG)}` \(sha256 `([^`]*)`\)")
_EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "F32": np.uint32(0x7F80 << 16),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}
"""Allowed types of tensors -> the exponent's bits, which are all 1 where a number is not finite."""
_ELEMENTS = 2**28
"""Most elements of one tensor, which is read as a whole: vocabulary of 262,144 at rank 1,024."""


@dataclass(frozen=True)
class _Folder:
    """A folder, and what several checks read from it."""

    path: Path
    role: Role
    no_pickle: bool

    @cached_property
    def names(self) -> list[str]:
        """Names of its entries, at most 10,000."""
        return [path.name for path in checks.entries(self.path)]

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of every file."""
        return {name: checks.sha256_of(self.path, name) for name in self.names}

    @cached_property
    def trees(self) -> dict[str, dict[str, Any]]:
        """The JSON files that transformers, peft or fintune read. Raises Unreadable."""
        read = {name for name in self.names if name.endswith(".json")}
        if self.role != "release":
            read &= {*LIMITS["loaded_json"]}
        return {name: checks.read_object(self.path, name) for name in sorted(read)}


def static_checks(folder: Path, role: Role, *, no_pickle: bool = False) -> Iterator[Check]:
    """Run the static checks of a folder, one at a time.

    Args:
        no_pickle: also refuse `training_args.bin`, which is otherwise allowed in a release by
            name and checksum and never opened.
    """
    of, of_releases = _Folder(folder, role, no_pickle), ("checksums", "provenance", "card")
    for name, question in _QUESTIONS.items():
        if role == "release" or name not in of_releases:
            yield ask(name, question, of)


def open_folder(folder: Path, role: Role) -> list[Check]:
    """Run the static checks of a folder; `probe` has those that need transformers and peft.

    Raises:
        GateRefused: a static check failed; the message names it.
    """
    report = Report(folder)
    report.run(lambda: static_checks(folder, role))
    report.settle()
    return report.checks


def check_paths(folder: Path, private: list[str]) -> Check:
    """No file contains a path of the machine that built the release.

    Args:
        private: absolute folders of this build, searched literally in every file. Other home
            folders are searched by pattern, in all files but the weights and tokenizer.json.
    """
    return ask("paths", _no_paths, folder, private)


def check_weights(folder: Path) -> Check:
    """Finite, non-empty LoRA tensors whose B matrices are not all zero; read without torch."""
    return ask("weights", _adapter_weights, folder)


def _no_paths(folder: Path, private: list[str]) -> str:
    hits = []
    for path in checks.entries(folder):
        with checks.open_file(folder, path.name) as file:
            data = file.read()
        named = [name for name in private if name.encode() in data]
        if path.name not in (checks.ADAPTER, "tokenizer.json"):
            named += _PATH.findall(data.decode("utf-8", "replace"))
        hits += [f"{path.name} ({name})" for name in named[:1]]
    refuse("a local path:", hits)
    return "no local path in any file"


def _check_files(of: _Folder) -> str:
    """Files that are read are regular; a release has only allowed names and no other pickle."""
    release, base, args = of.role == "release", of.role == "base", checks.TRAINING_ARGS
    loaded = {*LIMITS["loaded_json"], *LIMITS["loaded_files"]}
    read = {n for n in of.names if release or n in loaded or n.endswith(".safetensors")}
    for name in sorted(read):
        checks.open_file(of.path, name).close()
    unknown = read - {*LIMITS["release_names"]} if release else set[str]()
    needed = {"config.json"} if base else {checks.ADAPTER, checks.ADAPTER_CONFIG}
    refuse("missing:", needed - {*of.names})
    pickles = {name for name in unknown if Path(name).suffix.lower() in LIMITS["pickles"]}
    refuse("a pickle: reading it can run code:", pickles)
    refuse("not in the allow-list:", unknown)
    refuse("a pickle (--no-pickle):", read & {args} if of.no_pickle else ())
    refuse("an adapter, no base model:", read & {checks.ADAPTER_CONFIG} if base else ())
    never_opened = f"; {args} is a pickle and never opened" if args in read else ""
    return f"{len(read)} files" + (", all in the allow-list" if release else "") + never_opened


def _check_sums(of: _Folder) -> str:
    """SHA256SUMS lists every file with its hash."""
    sums, files = dict[str, str](), of.hashes.keys() - {checks.SUMS}
    if checks.SUMS not in of.names:
        unnoticed = f"no {checks.SUMS}: a change cannot be noticed"
        if checks.TRAINING_ARGS in files:
            raise Unreadable(f"{unnoticed}, and {checks.TRAINING_ARGS} is a pickle")
        return Note(unnoticed)
    for line in checks.read_text(of.path, checks.SUMS).splitlines():
        match = _SUM_LINE.fullmatch(line.rstrip())
        if match is None or match[2] in sums:
            raise Unreadable(f"{checks.SUMS}: not a line of sha256sum: {line[:80]!r}")
        sums[match[2]] = match[1]
    refuse("changed:", [name for name in files & sums.keys() if of.hashes[name] != sums[name]])
    refuse("missing:", sums.keys() - files)
    refuse("not listed:", files - sums.keys())
    return f"{len(sums)} files as listed"


def _check_provenance(of: _Folder) -> str:
    """The hashes in training_config.json are those of the files."""
    config = checks.read_object(of.path, checks.CONFIG, absent=True)
    if checks.PROVENANCE not in config:
        return Note(f"no {checks.CONFIG} says what it was made from")
    provenance, files = config[checks.PROVENANCE], config.get("files", {})
    if not isinstance(provenance, dict) or not isinstance(files, dict):
        raise Unreadable(f"{checks.CONFIG}: `provenance` or `files` is no object")
    # A release without samples holds no judged file and states no hash of one.
    absent = {checks.JUDGED} - {*of.names} if "judged_sha256" not in provenance else set()
    made_from = [(key, name) for key, name in LIMITS["made_from"].items() if name not in absent]
    stated = [(name, provenance.get(key)) for key, name in made_from] + [*files.items()]
    wrong = {name for name, digest in stated if of.hashes.get(name, "") != digest}
    refuse(f"not the files that {checks.CONFIG} names:", wrong)
    return f"{len(stated)} hashes as {checks.CONFIG} names them"


def _check_card(of: _Folder) -> str:
    """The verdict and the hash in the card are those of the files."""
    if checks.CARD not in of.names:
        return Note(f"no {checks.CARD}")
    card = checks.read_text(of.path, checks.CARD)
    results = checks.read_object(of.path, checks.RESULTS, absent=True)
    stated = (
        (_VERDICT, checks.RESULTS, str(results.get("verdict")).replace("_", " ")),
        (_CONFIG_SHA256, checks.CONFIG, of.hashes.get(checks.CONFIG, "")),
    )
    for pattern, name, value in stated:
        if {*pattern.findall(card)} - {value}:
            raise Unreadable(f"{checks.CARD} says something else than {name}")
    return f"{checks.CARD} contradicts no file"


def _check_configs(of: _Folder) -> str:
    """Every JSON file can be parsed, and a release names its base by a hub id."""
    config = of.trees.get(checks.ADAPTER_CONFIG, {})
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if of.role == "release" and not _HUB_ID.fullmatch(str(base)):
        raise Unreadable(f"{checks.ADAPTER_CONFIG} names {base!r}: no public model id")
    if not isinstance(base, str | None) or not isinstance(revision, str | None):
        raise Unreadable(f"{checks.ADAPTER_CONFIG}: a base or revision that is no text")
    return f"{len(of.trees)} JSON files"


def _check_hooks(of: _Folder) -> str:
    """No JSON file names code to import; with a note, as nothing here reads them: `auto_map` of a
    base, and `auto_mapping` of an adapter, which peft writes where no task type was given."""
    trees = [(name, of.trees[name]) for name in of.trees if name not in LIMITS["vocabularies"]]
    hooks = [f"{name}: {hook}" for name, tree in trees for hook in _hooks(tree)]
    unread = {"base": ": auto_map", "adapter": f"{checks.ADAPTER_CONFIG}: auto_mapping"}
    ignored = [hook for hook in hooks if hook.endswith(unread.get(of.role, "no hook"))]
    if imported := [hook for hook in hooks if hook not in ignored]:
        raise Unreadable(f"asks to import code ({some(imported)})")
    if ignored:
        return Note(f"names code that is never imported ({some(ignored)})")
    return "no configuration names code"


def _check_template(of: _Folder) -> str:
    """Chat templates use no names of Python's internals and read no other file.

    They are lexed and not rendered here; transformers renders them in a sandbox. CVE-2026-5760 is
    a server without either protection.
    """
    texts = [checks.read_text(of.path, name) for name in of.names if name == checks.TEMPLATE]
    for name in ("tokenizer_config.json", "chat_template.json"):
        inline = {"": of.trees.get(name, {}).get("chat_template")}
        texts += [text for _, text in _values(inline) if isinstance(text, str)]
    refuse("reaches for", [reach for text in texts if (reach := template_reaches(text))])
    return "" if texts else Note("no chat template")


def _values(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a JSON tree, at any depth."""
    rows = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in rows:
        yield str(key), value
        if isinstance(value, dict | list):
            yield from _values(value)


def _hooks(tree: Any) -> Iterator[str]:
    """Keys that name code to import, at any depth."""
    for key, value in _values(tree):
        kernel = key.endswith("_implementation") and not re.fullmatch("[a-z0-9_|]*", str(value))
        if value and (key in LIMITS["hooks"] or key.endswith("_internal") or kernel):
            yield key
        if key == "quantization_config" and isinstance(value, dict):
            method = value.get("quant_method", "bitsandbytes")
            if method not in LIMITS["quantizations"]:
                yield f"quant_method {method!r}"


def template_reaches(source: str) -> str:
    """The first unsafe token of a template's code, such as a name with `__`; empty without one."""
    last = ""
    for _, kind, value in jinja2.Environment().lex(source):
        if kind in {"name", "string"} and "__" in value:
            return value.strip("'\"")
        if kind == "name" and last == "." and value.startswith("_"):
            return value
        if kind == "name" and last == "|" and value == "attr":
            return "the attr filter"
        if kind == "name" and last == "{%" and value in LIMITS["template_tags"]:
            return f"{{% {value} %}}"
        if kind != "whitespace":
            last = value.rstrip("-+") if kind == "block_begin" else value
    return ""


def _check_weights(of: _Folder) -> str:
    """An adapter's tensors (`check_weights`); of a base only the headers of its shards."""
    if of.role != "base":
        return _adapter_weights(of.path)
    names = [name for name in of.names if name.endswith(".safetensors")]
    shards = of.trees.get(checks.WEIGHTS_INDEX, {}).get("weight_map") or {}
    if not isinstance(shards, dict):
        raise Unreadable(f"{checks.WEIGHTS_INDEX} has no weight_map")
    others = [name for name in map(str, shards.values()) if not _SHARD.fullmatch(name)]
    refuse(f"{checks.WEIGHTS_INDEX} names other files:", others)
    counts = [len(checks.read_header(of.path, name)) for name in names]
    return f"{sum(counts)} tensors in {len(names)} files"


def _adapter_weights(folder: Path) -> str:
    header = checks.read_header(folder, checks.ADAPTER)
    refuse("no type of an adapter:", {dtype for dtype, _ in header.values()} - _EXPONENTS.keys())
    counts = {name: int(np.prod(shape, dtype=object)) for name, (_, shape) in header.items()}
    lora_b = [name for name in header if "lora_B" in name]
    refuse("empty:", [name for name, count in counts.items() if not count])
    refuse("empty:", [] if lora_b else ["no LoRA tensors"])
    refuse("too large:", [name for name, count in counts.items() if count > _ELEMENTS])
    infinite, zero = [], 0
    with checks.open_file(folder, checks.ADAPTER) as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for name, count in counts.items():
            mask = _EXPONENTS[header[name][0]]
            bits = np.fromfile(file, mask.dtype, count)
            if len(bits) < count:
                raise Unreadable(f"{checks.ADAPTER} was cut while it was read")
            infinite += [name] if ((bits & mask) == mask).any() else []
            zero += name in lora_b and not (bits << mask.dtype.type(1)).any()
    refuse("NaN or infinite:", infinite)
    if zero == len(lora_b):
        raise Unreadable("every B matrix is zero: the adapter changes nothing")
    good = f"{len(header)} finite tensors, {sum(counts.values()):,} parameters"
    return good + (f"; {zero} of {len(lora_b)} B matrices are zero" if zero else "")


_QUESTIONS: dict[str, Callable[[_Folder], str]] = {
    "files": _check_files,
    "checksums": _check_sums,
    "provenance": _check_provenance,
    "card": _check_card,
    "config": _check_configs,
    "code hooks": _check_hooks,
    "template": _check_template,
    "weights": _check_weights,
}
