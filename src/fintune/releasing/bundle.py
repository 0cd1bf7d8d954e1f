"""Build the release folder from a finished run and its evaluation, or refuse it.

It is built beside its place and renamed (`files.staged_folder`), so a release is whole or absent.
The same inputs give the same bytes: no clock, no set order, modes 0644. What may be inside is the
allow-list of `untrusted.checks`; every file is made or copied here by name.
"""

import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from fintune import __version__, console, files, seal
from fintune.config import Config
from fintune.errors import GateRefused, OutputError
from fintune.model import COMMIT, Base, check_revision, load_release, load_tokenizer
from fintune.releasing.card import write_card
from fintune.releasing.gate import Inputs, gate, read_inputs
from fintune.releasing.golden import make_golden_prompts
from fintune.untrusted import checks, open_folder, static
from fintune.untrusted.checks import CARD, CONFIG, JUDGED, PROVENANCE, RESULTS
from fintune.untrusted.probe import probe_release

LLAMA_NOTICE = """\
Llama {0} is licensed under the Llama {0} Community License, \
Copyright © Meta Platforms, Inc. All Rights Reserved.
"""
"""The words section 1.b.iii of the Llama 3 licences asks for."""
_PRIVATE_ARGUMENTS = re.compile(
    r"(^format|_dir|_path|run_name|token|hub_.*|push_to_hub.*|project|trackio.*|local_rank)$"
)
_FOLDERS = frozenset({"out", "path"})
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
        gate(inputs)
        console.heading(f"release {config.name}")
        with files.staged_folder(
            final, published=True, free=lambda: seal.move_aside(final)
        ) as staging:
            _build(staging, inputs)
            report = checks.Report(final)
            report.run(lambda: static.static_checks(staging, "release"))
            report.run(lambda: [static.check_paths(staging, _private(inputs))])
            report.run(lambda: check_revision(staging, inputs.base))
            report.run(lambda: probe_release(staging, inputs.base.folder))
            report.settle()
    console.say(f"released: {final}")
    return final


def _keep(final: Path, inputs: Inputs) -> Path:
    """An existing release of the same inputs stays; any other is never overwritten."""
    old = files.read_json(final / CONFIG) if (final / CONFIG).is_file() else {}
    if differing := seal.differences(old.get(PROVENANCE, {}), inputs.provenance):
        raise OutputError(
            f"{final} holds the release of other inputs; these differ: {'; '.join(differing)}",
            fix="choose another folder (--set release.out=...), or --fresh (moves it aside)",
        )
    open_folder(final, "release")
    console.say(f"released already, unchanged: {final}")
    return final


def _build(staging: Path, inputs: Inputs) -> None:
    """Write every file of the release; SHA256SUMS last."""
    config, base = inputs.config, inputs.base
    best = config.run_dir / "best"
    files.copy_file(best / checks.ADAPTER, staging / checks.ADAPTER)
    # peft asks the hub for `revision`, so only a commit may stand there.
    revision = base.revision if COMMIT.fullmatch(base.revision) else None
    named = {"base_model_name_or_path": base.id, "revision": revision, "inference_mode": True}
    tree = files.read_json(best / checks.ADAPTER_CONFIG) | named
    _write_json(staging / checks.ADAPTER_CONFIG, tree)
    _write_tokenizer(load_tokenizer(base), staging)
    kept = {k: v for k, v in inputs.arguments.items() if not _PRIVATE_ARGUMENTS.search(k)}
    if config.release.training_args_bin:
        files.write_bytes(staging / checks.TRAINING_ARGS, _pickled(kept))
    for name in (RESULTS, JUDGED):
        files.copy_file(config.eval_dir / name, staging / name)
    loaded = load_release(staging, base, date_string=inputs.recipe.chat.date_string)
    files.write_json(staging / checks.FIXTURE, make_golden_prompts(loaded))
    llama = _write_llama_license(staging, base)
    facts = {
        "fintune": __version__,
        "config": _without_paths(inputs.recipe.model_dump(mode="json")),
        "training_arguments": _without_paths(kept),
        PROVENANCE: inputs.provenance,
        "files": {path.name: files.sha256_file(path) for path in sorted(staging.iterdir())},
    }
    files.write_json(staging / CONFIG, facts)
    judged = list(files.read_jsonl(staging / JUDGED))
    card = write_card(inputs, judged, files.sha256_file(staging / CONFIG), llama=llama)
    files.write_text(staging / CARD, card)
    hashes = {path.name: files.sha256_file(path) for path in sorted(staging.iterdir())}
    sums = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    files.write_text(staging / checks.SUMS, sums)


def _write_tokenizer(tokenizer: Any, staging: Path) -> None:
    """The tokenizer's files by name, and a special_tokens_map that agrees with it.

    transformers 5 no longer writes the map; older loaders still read it and believe it. The class
    is named as versions 4 and 5 both know it (5 alone writes TokenizersBackend).
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in ("tokenizer.json", checks.TEMPLATE):
            files.copy_file(Path(folder) / name, staging / name)
        tree = files.read_json(Path(folder) / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "name_or_path", "backend"):
        tree.pop(key, None)
    tree["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(staging / "tokenizer_config.json", tree)
    _write_json(staging / "special_tokens_map.json", dict(tokenizer.special_tokens_map))


def _without_paths(value: Any) -> Any:
    """The same tree without folders; of a file's path the last part is kept."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items() if key not in _FOLDERS}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return Path(value).name
    return value


def _pickled(arguments: dict[str, Any]) -> bytes:
    """training_args.bin as the Trainer writes it, from a fresh object; it is never read here."""
    fields = TrainingArguments.__dataclass_fields__
    known = {k: v for k, v in arguments.items() if k in fields and v is not None}
    # transformers would take an absent disable_tqdm from this process's log level.
    fixed = {"output_dir": ".", "report_to": [], "use_cpu": True}
    fresh = TrainingArguments(**{"disable_tqdm": False} | known | fixed)
    fresh.use_cpu = bool(arguments.get("use_cpu", False))
    # A pickle writes a string once for each object that holds it, so equal strings must be one.
    texts = {k: sys.intern(v) for k, v in vars(fresh).items() if type(v) is str}
    vars(fresh).update(texts)
    buffer = io.BytesIO()
    torch.save(fresh, buffer)
    return buffer.getvalue()


def _write_llama_license(staging: Path, base: Base) -> str | None:
    """LICENSE and NOTICE of a Llama base beside its adapter; its version, or None for others."""
    found = _LLAMA.search(base.id)
    if found is None:
        return None
    license_file = min(base.folder.glob("LICENSE*"), default=None)
    if license_file is None:
        raise GateRefused(
            f"no licence text of {base.id} was found",
            why="Llama's licence asks for a copy of itself with everything derived from it",
            fix=f"put the base's LICENSE into {base.folder}",
        )
    files.copy_file(license_file, staging / "LICENSE")
    files.write_text(staging / "NOTICE", LLAMA_NOTICE.format(found.group(1)))
    return found.group(1)


def _private(inputs: Inputs) -> list[str]:
    """Absolute folders of this machine that no published file may contain."""
    config = inputs.config
    folders = [config.data_dir, config.run_dir, config.eval_dir, inputs.base.folder, Path.cwd()]
    texts = {str(folder.resolve()) for folder in [*folders, Path.home()]}
    return sorted(text for text in texts if text.count("/") > 1)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    """JSON of a foreign format (peft, transformers): without our format number."""
    files.write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
