"""Any release folder, ours or not: does it hold what it says, and does it answer as trained?

First what the bytes say (`checks`), and nothing is loaded unless all of that passed. Then the
base: keys and shapes. Then the adapter is loaded as the seed's usage snippet loads it, the prompt
fixture is rendered again, and the recorded greedy answers are held against the weights.
"""

from pathlib import Path
from typing import Any

import torch

from fintune.chat import ChatFormat
from fintune.errors import FintuneError, ModelError, OutputError
from fintune.files import read_json
from fintune.model import Base, load_adapter, load_base, read_tokenizer, release_base
from fintune.release import checks
from fintune.release.checks import Check, Report
from fintune.release.fixture import check_answers, check_fixture, read_fixture
from fintune.release.provenance import check_provenance
from fintune.release.remote import check_server


def verify(
    folder: Path, *, base: Path | None = None, no_pickle: bool = False, server: str | None = None
) -> Report:
    """Check a release folder; return the report when nothing failed.

    Args:
        folder: the release.
        base: folder of its base; absent: the bundled one, or the hub's by id and revision.
        no_pickle: also refuse `training_args.bin`, which is otherwise allowed by name and
            checksum and never opened.
        server: URL of a running OpenAI-compatible server that serves this release.

    Raises:
        GateRefused: at least one check failed; the message names each.
        OutputError: no such folder.
        ModelError: the base is not on this machine and cannot be fetched.
    """
    if not folder.is_dir():
        raise OutputError(f"no release folder at {folder}")
    report = Report(folder)
    report.checks += checks.static_checks(folder, no_pickle=no_pickle)
    report.checks += check_provenance(folder)
    report.checks.append(checks.check_paths(folder, []))
    report.settle()
    found = release_base(folder, base)
    report.checks += checks.check_base(folder, found)
    report.settle()
    _check_loaded(report, found)
    report.settle()
    if server is not None:
        fixture = read_fixture(folder)
        if fixture is None:
            raise ModelError(f"{folder} has no {checks.FIXTURE} to hold a server against")
        names = ["adapter", folder.resolve().name]
        report.checks += check_server(fixture, read_tokenizer(folder), server, names)
        report.settle()
    return report


def load_release(folder: Path, base: Base, dtype: str) -> Any:
    """Base with adapter, ready for inference."""
    return load_adapter(load_base(base, "none", dtype), folder)  # type: ignore[arg-type]


def _check_loaded(report: Report, base: Base) -> None:
    folder, dtype = report.folder, "bf16" if torch.cuda.is_available() else "fp32"
    try:
        tokenizer = read_tokenizer(folder)
        model = load_release(folder, base, dtype)
    except FintuneError as error:
        report.checks.append(Check("load", "failed", error.what))
        return
    report.checks.append(Check("load", "ok", f"peft loads it on {base.id} ({dtype})"))
    report.checks.append(_check_tokens(folder, tokenizer))
    fixture = read_fixture(folder)
    if fixture is None:
        report.checks.append(Check("fixture", "note", "no prompt_fixture.json: prompts unproved"))
        return
    try:
        report.checks.append(check_fixture(fixture, ChatFormat(tokenizer, fixture["date_string"])))
        report.checks += check_answers(fixture, model, dtype)
    except (FintuneError, KeyError, TypeError, IndexError) as error:
        report.checks.append(Check("fixture", "failed", f"unusable: {str(error)[:200]}"))


def _check_tokens(folder: Path, tokenizer: Any) -> Check:
    """special_tokens_map.json says what the tokenizer does."""
    path = folder / "special_tokens_map.json"
    if not path.is_file():
        return Check("tokenizer", "note", "no special_tokens_map.json")
    tree = read_json(path)
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in tree.items()}
    known = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    other = [key for key in sorted(named) if key in known and named[key] != known[key]]
    if other:
        return Check("tokenizer", "failed", f"special_tokens_map differs: {', '.join(other)}")
    return Check("tokenizer", "ok", f"{len(tokenizer)} tokens, special tokens agree")
