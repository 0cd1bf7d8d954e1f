"""What a folder's bytes say, before torch or transformers see any of it.

JSON is held against schemas and searched for keys that name code, templates are read as Jinja
tokens, weights as bits. `static_checks` stops at the first stage that fails.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jinja2
from pydantic import ValidationError

from fintune.untrusted.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    FIXTURE,
    LIMITS,
    SUMS,
    TEMPLATE,
    TRAINING_ARGS,
    Check,
    Report,
    Unreadable,
    open_file,
    read_object,
    read_sums,
    read_text,
    sha256_of,
    some,
)
from fintune.untrusted.provenance import check_provenance
from fintune.untrusted.schemas import SCHEMAS
from fintune.untrusted.weights import check_base_weights, check_weights, read_header

Role = Literal["release", "adapter", "base"]
"""A release of ours (an allow-list of names), any peft folder, a base model."""
ALLOWED, PICKLES = frozenset(LIMITS["release_names"]), frozenset(LIMITS["pickles"])
_ENTRIES = 10_000
_PATH = re.compile(r"""(?<![\w./:~-])(?:/(?:home|Users|root|tmp)/[\w.-]+|[A-Za-z]:\\+Users\\+\w)""")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IMPLEMENTATION = re.compile(r"[a-z0-9_|]*")
__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "FIXTURE",
    "SUMS",
    "TEMPLATE",
    "TRAINING_ARGS",
    "Check",
    "Report",
    "Role",
    "Unreadable",
    "check_paths",
    "check_weights",
    "read_header",
    "read_object",
    "some",
    "static_checks",
    "template_reaches",
]


def static_checks(folder: Path, role: Role, *, no_pickle: bool = False) -> list[Check]:
    """Everything that can be said about a folder from its bytes alone.

    Args:
        no_pickle: also refuse `training_args.bin`, which is otherwise allowed in a release by
            name and checksum and never opened.
    """
    report = Report(folder)
    report.run(lambda: _check_files(folder, role, no_pickle=no_pickle))
    if role == "release" and not report.failed:
        hashes = {path.name: sha256_of(folder, path.name) for path in folder.iterdir()}
        report.run(lambda: _check_sums(folder, hashes))
        report.run(lambda: _check_provenance(folder, hashes))
    report.run(lambda: _check_configs(folder, role))
    report.run(lambda: [_check_template(folder)])
    if role == "base":
        report.run(lambda: check_base_weights(folder))
    else:
        report.run(lambda: check_weights(folder))
    return report.checks


def check_paths(folder: Path, private: list[str]) -> Check:
    """No file names a folder of the machine that built it.

    Args:
        private: absolute folders of this build; found literally, in any file. Home folders of
            others are found by their form, in every text file but the tokenizer's vocabulary.
    """
    hits = []
    for path in sorted(folder.iterdir()):
        binary = path.name in {ADAPTER, "tokenizer.json"}
        if binary and not private:
            continue
        with open_file(folder, path.name) as file:
            data = file.read()
        text = "" if binary else data.decode("utf-8", "replace")
        found = next((name for name in private if name.encode() in data), None)
        match = _PATH.search(text)
        if found or match:
            hits.append(f"{path.name} ({found or (match and match.group())})")
    found_in = f"a local path in {', '.join(hits)}" if hits else ""
    return Check.of("paths", found_in, "no local path in any file")


def _check_files(folder: Path, role: Role, *, no_pickle: bool) -> Iterator[Check]:
    """Regular files; of a release only names of the allow-list, no pickle without a checksum."""
    names = sorted(path.name for path in islice(folder.iterdir(), _ENTRIES))
    needed = ("config.json",) if role == "base" else (ADAPTER, ADAPTER_CONFIG)
    read = names
    if role != "release":
        known = {*LIMITS["loaded_json"], *LIMITS["loaded_files"]}
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


def _check_sums(folder: Path, hashes: dict[str, str]) -> Iterator[Check]:
    """SHA256SUMS names every file, and every file has the hash it names."""
    try:
        sums = read_sums(folder)
    except Unreadable as error:
        yield Check("checksums", "failed", str(error))
        return
    present = hashes.keys() - {SUMS}
    if not sums:
        status: Literal["failed", "note"] = "failed" if TRAINING_ARGS in present else "note"
        of_pickle = f", and {TRAINING_ARGS} is a pickle" if status == "failed" else ""
        yield Check("checksums", status, f"no {SUMS}: a change cannot be noticed{of_pickle}")
        return
    changed = [name for name in sorted(present & sums.keys()) if hashes[name] != sums[name]]
    problems = [f"changed: {some(changed)}"] if changed else []
    problems += [f"missing: {name}" for name in sorted(sums.keys() - present)]
    problems += [f"not listed: {name}" for name in sorted(present - sums.keys())]
    yield Check.of("checksums", some(problems), f"{len(sums)} files as listed")


def _check_provenance(folder: Path, hashes: dict[str, str]) -> Iterator[Check]:
    try:
        yield from check_provenance(folder, hashes)
    except Unreadable as error:
        yield Check("provenance", "failed", str(error))


def _check_configs(folder: Path, role: Role) -> Iterator[Check]:
    """JSON that is JSON, of the expected types, that names no code."""
    problems: list[str] = []
    hooks: list[str] = []
    ignored: list[str] = []
    present = {path.name for path in islice(folder.iterdir(), _ENTRIES)}
    read = {name for name in present if name.endswith(".json")}
    if role != "release":
        read &= set(LIMITS["loaded_json"])
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
        if name not in LIMITS["vocabularies"]:
            for key in _hooks(tree):
                found = ignored if role == "base" and key == "auto_map" else hooks
                found.append(f"{name}: {key}")
        base = tree.get("base_model_name_or_path")
        if name == ADAPTER_CONFIG and role == "release" and not _HUB_ID.fullmatch(str(base)):
            problems.append(f"{name}: base_model_name_or_path is {base!r}: no public model id")
    yield Check.of("config", some(problems), f"{len(read)} JSON files")
    asked = f"asks to import code ({some(hooks)})" if hooks else ""
    yield Check.of("code hooks", asked, "no configuration names code")
    if ignored:
        yield Check("code hooks", "note", f"names code that is never imported ({some(ignored)})")


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


def _hooks(tree: Any) -> Iterator[str]:
    """Keys that name code to import, at any depth."""
    if isinstance(tree, list):
        for value in tree:
            yield from _hooks(value)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            kernel = key.endswith("_implementation") and not _IMPLEMENTATION.fullmatch(str(value))
            if value and (key in LIMITS["hooks"] or key.endswith("_internal") or kernel):
                yield key
            if key == "quantization_config" and isinstance(value, dict):
                method = value.get("quant_method", "bitsandbytes")
                if method not in LIMITS["quantizations"]:
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
        if kind == "name" and last == "{%" and value in LIMITS["template_tags"]:
            return f"{{% {value} %}}"
        if kind != "whitespace":
            last = value.rstrip("-+") if kind == "block_begin" else value
    return ""
