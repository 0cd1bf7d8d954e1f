"""What a release says of its own files, held against the files.

`training_config.json` names the sha256 of what the release was made from (`provenance`) and of
every file beside it (`files`); the card names the sha256 of `training_config.json` and the verdict.
So a changed file is contradicted by another one, also where its line in SHA256SUMS was redone.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fintune.untrusted.files import ADAPTER, Check, read_object, read_text

CARD = "README.md"
CONFIG = "training_config.json"
JUDGED = "eval_50_gpt_judged_raw.jsonl"
PROVENANCE = "provenance"
RESULTS = "test_results.json"
MADE_FROM = {"adapter_sha256": ADAPTER, "test_results_sha256": RESULTS, "judged_sha256": JUDGED}
"""Hashes of the provenance whose files are in the release."""
_VERDICT = re.compile(r"Verdict: \*\*([^*]*)\*\*")
_CONFIG_SHA256 = re.compile(rf"`{re.escape(CONFIG)}` \(sha256 `([^`]*)`\)")


def check_provenance(folder: Path, hashes: dict[str, str]) -> Iterator[Check]:
    """Hold every hash and verdict that a release states of its own files against them.

    A folder that states nothing, as other tools' do, gets a note.

    Args:
        hashes: sha256 of each file of the folder.

    Raises:
        Unreadable: a file that states something cannot be read.
    """
    yield _check_hashes(read_object(folder, CONFIG) if CONFIG in hashes else {}, hashes)
    if CARD in hashes:
        yield _check_card(folder, hashes)


def _check_hashes(config: dict[str, Any], hashes: dict[str, str]) -> Check:
    if PROVENANCE not in config:
        return Check("provenance", "note", f"no {CONFIG} says what it was made from")
    provenance, files = config[PROVENANCE], config.get("files", {})
    if not isinstance(provenance, dict) or not isinstance(files, dict):
        return Check("provenance", "failed", f"{CONFIG} holds no provenance that can be read")
    named = [(name, provenance.get(key)) for key, name in MADE_FROM.items()] + [*files.items()]
    wrong = sorted({name for name, digest in named if hashes.get(name, "") != digest})
    problem = f"not the files that {CONFIG} names: {', '.join(wrong[:5])}" if wrong else ""
    return Check.of("provenance", problem, f"{len(named)} hashes as {CONFIG} names them")


def _check_card(folder: Path, hashes: dict[str, str]) -> Check:
    card = read_text(folder, CARD)
    results = read_object(folder, RESULTS) if RESULTS in hashes else {}
    stated = (
        (_VERDICT, RESULTS, str(results.get("verdict")).replace("_", " ")),
        (_CONFIG_SHA256, CONFIG, hashes.get(CONFIG, "")),
    )
    wrong = [name for form, name, true in stated if {*form.findall(card)} - {true}]
    problem = f"{CARD} says something else than {' and '.join(wrong)}" if wrong else ""
    return Check.of("card", problem, f"{CARD} contradicts no file")
