"""What a release says of its own files, held against the files.

`training_config.json` names the sha256 of what the release was made from (`provenance`) and of
every file beside it (`files`); the card names the sha256 of `training_config.json` and the verdict.
So a changed file is contradicted by another one, also where its line in SHA256SUMS was redone.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fintune.files import sha256_file
from fintune.release.checks import ADAPTER, Check

CARD = "README.md"
CONFIG = "training_config.json"
JUDGED = "eval_50_gpt_judged_raw.jsonl"
PROVENANCE = "provenance"
RESULTS = "test_results.json"
MADE_FROM = {"adapter_sha256": ADAPTER, "test_results_sha256": RESULTS, "judged_sha256": JUDGED}
"""Hashes of the provenance whose files are in the release."""
_VERDICT = re.compile(r"Verdict: \*\*([^*]*)\*\*")
_CONFIG_SHA256 = re.compile(rf"`{re.escape(CONFIG)}` \(sha256 `([^`]*)`\)")


def check_provenance(folder: Path) -> Iterator[Check]:
    """Hold every hash and verdict that a release states of its own files against them.

    Nothing is loaded. A folder that states nothing, as other tools' do, gets a note.
    """
    found = (path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    here = {path.name: path for path in found}
    yield _check_hashes(here, _object(here[CONFIG]) if CONFIG in here else {})
    if CARD in here:
        yield _check_card(here)


def _check_hashes(here: dict[str, Path], config: dict[str, Any] | None) -> Check:
    if config is not None and PROVENANCE not in config:
        return Check("provenance", "note", f"no {CONFIG} says what it was made from")
    provenance, files = (config or {}).get(PROVENANCE), (config or {}).get("files", {})
    if not isinstance(provenance, dict) or not isinstance(files, dict):
        return Check("provenance", "failed", f"{CONFIG} holds no provenance that can be read")
    named = [(name, provenance.get(key)) for key, name in MADE_FROM.items()] + [*files.items()]
    hashes = {name: sha256_file(here[name]) for name, _ in named if name in here}
    wrong = sorted({name for name, digest in named if hashes.get(name, "") != digest})
    problem = f"not the files that {CONFIG} names: {', '.join(wrong[:5])}" if wrong else ""
    return Check.of("provenance", problem, f"{len(hashes)} files as {CONFIG} names them")


def _check_card(here: dict[str, Path]) -> Check:
    card = here[CARD].read_text(encoding="utf-8", errors="replace")
    results = (_object(here[RESULTS]) if RESULTS in here else None) or {}
    stated = (
        (_VERDICT, RESULTS, str(results.get("verdict")).replace("_", " ")),
        (_CONFIG_SHA256, CONFIG, sha256_file(here[CONFIG]) if CONFIG in here else ""),
    )
    wrong = [name for form, name, true in stated if {*form.findall(card)} - {true}]
    problem = f"{CARD} says something else than {' and '.join(wrong)}" if wrong else ""
    return Check.of("card", problem, f"{CARD} contradicts no file")


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is another thing."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None
