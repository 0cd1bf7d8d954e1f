"""A finished run and its evaluation in; a release folder out, or a refusal that says why.

Built beside its place and renamed (`files.staged_folder`), so a release is whole or absent. The
same inputs give the same bytes: no clock, no set order, modes 0644. What may be inside is the
allow-list of `untrusted.checks`, and every file is made or copied here by name.
"""

import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from transformers import TrainingArguments

from fintune import __version__, console, files, seal
from fintune.config import Config
from fintune.errors import GateRefused, OutputError
from fintune.model import COMMIT, WEIGHTS, check_revision, load_release, load_tokenizer
from fintune.release.card import write_card
from fintune.release.gate import Inputs, gate, read_inputs
from fintune.release.golden import make_golden_prompts
from fintune.untrusted import checks, open_folder, static
from fintune.untrusted.checks import CARD, CONFIG, JUDGED, PROVENANCE, RESULTS
from fintune.untrusted.probe import probe_release

LLAMA_NOTICE = (
    "Llama {version} is licensed under the Llama {version} Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
)
"""The words section 1.b.iii of the Llama 3 licences asks for."""
_PRIVATE_ARGUMENTS = re.compile(
    r"(_dir|_path|run_name|token|hub_.*|push_to_hub.*|project|trackio.*|local_rank)$"
)
_FOLDERS = frozenset({"out", "path", "license_file"})
_LLAMA = re.compile(r"llama-?(\d(?:\.\d)?)", re.IGNORECASE)


def release(config: Config, *, fresh: bool = False, accept: str | None = None) -> Path:
    """Build `config.release_dir` from the finished data, run and evaluation folders.

    Args:
        fresh: replace an existing release, which is moved aside when the new one is complete.
        accept: reason to publish an adapter whose verdict is not `better`; printed on the card.

    Returns:
        The release folder. An existing one of the same inputs is kept as it is.

    Raises:
        GateRefused: the adapter was not shown to be better, its evaluation rows were trained on,
            its weights are empty or not finite, or a file would name a local path.
        OutputError: an input is unfinished, or the folder holds another release.
    """
    inputs = read_inputs(config, accept)
    final = config.release_dir
    with seal.lock(final):
        if not seal.empty(final):
            seal.check_ours(final)
            if not fresh:
                return _keep(final, inputs)
        gate(inputs, accept)
        console.heading(f"release {config.release.name or config.name}")
        with files.staged_folder(final, published=True, free=lambda: _move(final)) as staging:
            _build(staging, inputs, accept)
            report = checks.Report(final)
            report.run(lambda: static.static_checks(staging, "release"))
            report.run(lambda: [static.check_paths(staging, _private(inputs))])
            report.run(lambda: check_revision(staging, inputs.base))
            report.run(lambda: probe_release(staging, inputs.base.folder))
            report.settle()
    console.say(f"released: {final}")
    return final


def _move(final: Path) -> None:
    if aside := seal.move_aside(final):
        console.say(f"moved the old release to {aside}")


def _keep(final: Path, inputs: Inputs) -> Path:
    """An existing release of the same inputs stays; any other is never overwritten."""
    try:
        old = files.read_json(final / CONFIG).get(PROVENANCE)
    except (OSError, ValueError, RecursionError):
        old = None
    differing = seal.differences(old if isinstance(old, dict) else {}, _provenance(inputs))
    if differing:
        raise OutputError(
            f"{final} holds the release of other inputs; these differ: {'; '.join(differing)}",
            fix="choose another folder (--set release.out=...), or --fresh (moves it aside)",
        )
    open_folder(final, "release")
    console.say(f"released already, unchanged: {final}")
    return final


def _build(staging: Path, inputs: Inputs, accept: str | None) -> None:
    """Write every file of the release; SHA256SUMS last."""
    config, base = inputs.config, inputs.base
    files.copy_file(config.run_dir / "best" / checks.ADAPTER, staging / checks.ADAPTER)
    _write_json(staging / checks.ADAPTER_CONFIG, _adapter_config(inputs))
    _write_tokenizer(load_tokenizer(base), staging)
    arguments = _training_arguments(config.run_dir)
    if config.release.training_args_bin:
        files.write_bytes(staging / checks.TRAINING_ARGS, _pickled(arguments))
    for name in (RESULTS, JUDGED):
        files.copy_file(config.eval_dir / name, staging / name)
    loaded = load_release(staging, base, date_string=inputs.recipe.chat.date_string)
    files.write_json(staging / checks.FIXTURE, make_golden_prompts(loaded))
    llama = _llama_duties(staging, inputs)
    hashes = {path.name: files.sha256_file(path) for path in staging.iterdir()}
    facts = {
        "fintune": __version__,
        "config": _without_paths(inputs.recipe.model_dump(mode="json")),
        "training_arguments": _without_paths(arguments),
        PROVENANCE: _provenance(inputs),
        "files": dict(sorted(hashes.items())),
    }
    files.write_json(staging / CONFIG, facts)
    hashes[CONFIG] = files.sha256_file(staging / CONFIG)
    judged = list(files.read_jsonl(staging / JUDGED))
    card = write_card(inputs, judged, hashes[CONFIG], llama=llama, accepted=accept)
    files.write_text(staging / CARD, card)
    hashes[CARD] = files.sha256_file(staging / CARD)
    sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    files.write_text(staging / checks.SUMS, sums)


def _provenance(inputs: Inputs) -> dict[str, Any]:
    """What the release was made from; a base without a commit by the sha256 of its weights."""
    local = WEIGHTS.fullmatch(inputs.base.revision)
    return inputs.provenance | ({"base_sha256": inputs.base.revision} if local else {})


def _adapter_config(inputs: Inputs) -> dict[str, Any]:
    """peft's configuration with the base by public name.

    `revision` is what peft asks the hub for, so only a commit may stand there.
    """
    path = inputs.config.run_dir / "best" / checks.ADAPTER_CONFIG
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree | {
        "base_model_name_or_path": inputs.base.id,
        "revision": inputs.base.revision if COMMIT.fullmatch(inputs.base.revision) else None,
        "inference_mode": True,
    }


def _write_tokenizer(tokenizer: Any, staging: Path) -> None:
    """The tokenizer's files by name, and a special_tokens_map that agrees with it.

    transformers 5 no longer writes the map; older loaders still read it and believe it. The class
    is named as versions 4 and 5 both know it (5 alone writes TokenizersBackend).
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in ("tokenizer.json", checks.TEMPLATE):
            files.copy_file(Path(folder) / name, staging / name)
        tree = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path", "backend"):
        tree.pop(key, None)
    tree["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(staging / "tokenizer_config.json", tree)
    _write_json(staging / "special_tokens_map.json", dict(tokenizer.special_tokens_map))


def _training_arguments(run: Path) -> dict[str, Any]:
    """The run's effective TrainingArguments without paths, names and tokens of its machine."""
    path = run / "training_arguments.json"
    tree = files.read_json(path) if path.is_file() else {}
    tree.pop("format", None)
    return {key: value for key, value in tree.items() if not _PRIVATE_ARGUMENTS.search(key)}


def _without_paths(value: Any) -> Any:
    """The same tree without folders; a file is named by its last part, as a stranger would."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key not in _FOLDERS}
        return {key: _without_paths(part) for key, part in kept.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return Path(value).name
    return value


def _interned(value: Any) -> Any:
    if isinstance(value, dict):
        return {_interned(key): _interned(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_interned(part) for part in value]
    return sys.intern(value) if type(value) is str else value


def _pickled(arguments: dict[str, Any]) -> bytes:
    """training_args.bin as the Trainer writes it, from a fresh object; it is never read here."""
    known = set(TrainingArguments.__dataclass_fields__)
    kept = {k: v for k, v in arguments.items() if k in known and v is not None}
    # transformers would take an absent disable_tqdm from this process's log level.
    fixed = {"output_dir": ".", "report_to": [], "use_cpu": True}
    fresh = TrainingArguments(**{"disable_tqdm": False} | kept | fixed)
    fresh.use_cpu = bool(arguments.get("use_cpu", False))
    # A pickle writes a string once for each object that holds it, so equal strings must be one.
    fresh.__dict__.update(_interned(vars(fresh)))
    buffer = io.BytesIO()
    torch.save(fresh, buffer)
    return buffer.getvalue()


def _llama_duties(staging: Path, inputs: Inputs) -> str | None:
    """Licence and notice of a Llama base beside its adapter; its version, or None for others."""
    found = _LLAMA.search(inputs.base.id)
    if found is None:
        return None
    source = _license_file(inputs)
    if source is None:
        raise GateRefused(
            f"no licence text of {inputs.base.id} was found",
            why="Llama's licence asks for a copy of itself with everything derived from it",
            fix="set release.license_file to the base's LICENSE",
        )
    files.copy_file(source, staging / "LICENSE")
    files.write_text(staging / "NOTICE", LLAMA_NOTICE.format(version=found.group(1)))
    return found.group(1)


def _license_file(inputs: Inputs) -> Path | None:
    named = inputs.config.release.license_file
    if named is not None:
        return named if named.is_file() else None
    beside = sorted(inputs.base.folder.glob("LICENSE*"))
    if beside or inputs.config.model.path is not None:
        return beside[0] if beside else None
    try:
        base = inputs.base
        return Path(huggingface_hub.hf_hub_download(base.id, "LICENSE", revision=base.revision))
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError):
        return None


def _private(inputs: Inputs) -> list[str]:
    """Absolute folders of this machine that no published file may contain."""
    config = inputs.config
    folders = [config.data_dir, config.run_dir, config.eval_dir, inputs.base.folder, Path.cwd()]
    texts = {str(folder.resolve()) for folder in [*folders, Path.home()]}
    return sorted(text for text in texts if text.count("/") > 1)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    """JSON of a foreign format (peft, transformers): without our format number."""
    files.write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
