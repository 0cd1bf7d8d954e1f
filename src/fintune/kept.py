"""A stage that was kept is kept again without torch, while all that it depends on is as it was."""

import glob
import re
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fintune import console, files, seal
from fintune.config import Config
from fintune.sample import SAMPLE

PACKAGES = ("fintune", "torch", "transformers", "peft", "numpy")
STAGES = {"data": seal.DONE, "train": seal.DONE, "eval": seal.DONE, "release": "SHA256SUMS"}
"""Section of a stage -> the file that its folder gets last."""


def once(
    work: Callable[[], object], config: Config, *stages: str, fresh: object, **given: str | None
) -> None:
    """Do the work of stages, unless they were kept with everything as it is now.

    Args:
        stages: the last of them needs all others.
        fresh: do it in any case.
        given: what else the work was given.
    """
    asked = [stages, given, config.model_dump(mode="json"), *map(version, PACKAGES)]
    if not fresh and (mark := _mark(config, stages[-1], asked)) and mark.exists():
        for stage in stages:
            _tell(stage, config, given.get("judge_host") or "")
        return
    work()
    with suppress(OSError):  # it only saves time
        if mark := _mark(config, stages[-1], asked):
            files.write_text(mark, "")


def _mark(config: Config, last: str, asked: list[Any]) -> Path | None:
    """A file of the user's cache that is there once a stage was kept with everything as it is now.

    Its name is a hash of what was asked, of the content of the stage's folder and those before it,
    and of what the config names on this machine, by `files.same_file`. None where a folder is
    unfinished, or a name of the hub may mean another commit today.
    """
    facts, base, data = list[Any](), config.model, config.data
    named = [(str(base.path or base.id), base.revision), (data.source, None)]
    sets = (*data.sources, *data.benchmarks, *config.eval.tasks.values())
    named += [(config.eval.suite or "", None), *((each.path, each.revision) for each in sets)]
    with suppress(OSError):
        for name, revision in named:
            if name in ("", SAMPLE):
                continue
            place = Path(name).expanduser()
            found = [place] if place.exists() else map(Path, glob.glob(str(place), recursive=True))
            paths = [path for root in found for path in (root, *sorted(root.rglob("*")))]
            if not paths and not re.fullmatch("[0-9a-f]{40}", str(revision)):
                return None
            facts += [files.same_file(path) for path in paths]
        for stage in [*STAGES][: [*STAGES].index(last) + 1]:
            folder = config.folders()[f"{stage}.out"]
            sealed = files.sha256_file(folder / STAGES[stage])
            facts.append([str(folder.resolve()), sealed, seal.manifest(folder, seal.UNREAD)])
        return files.cache_dir() / "kept" / files.sha256_json([asked, facts])
    return None


def _tell(stage: str, config: Config, judge_host: str) -> None:
    """Say of a kept stage what it says itself."""
    from fintune.evals import endpoint, results
    from fintune.releasing.contents import announced

    folder = config.folders()[f"{stage}.out"]
    if stage == "release":
        console.say(announced(files.read_json(folder / "training_config.json")))
        console.say(f"released already, unchanged: {folder}")
        return
    console.say(f"{folder}: unchanged, kept")
    if stage == "eval":
        found = results.tell(endpoint.shown_dir(config, judge_host))
        endpoint.tell_unjudged(config.eval.judge, judge_host, found)
