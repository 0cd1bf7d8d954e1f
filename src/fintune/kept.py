"""A stage that was kept is kept again without torch, while all that it depends on is as it was."""

import glob
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fintune import console, seal
from fintune.config import Config
from fintune.files import cache_dir, read_json, sha256_file, sha256_json, write_text
from fintune.hub import COMMIT
from fintune.sample import SAMPLE

PACKAGES = ("fintune", "torch", "transformers", "peft", "numpy")
STAGES = {"data": seal.DONE, "train": seal.DONE, "eval": seal.DONE, "release": "SHA256SUMS"}
"""Section of a stage -> the file that its folder gets last."""


def once(
    work: Callable[[], object],
    config: Config,
    *stages: str,
    fresh: object,
    accept: str | None = None,
    judge_host: str = "",
) -> None:
    """Do the work of stages, unless they were kept with everything as it is now.

    Args:
        stages: the last of them needs all others.
        fresh: do it in any case.
    """
    given = [stages, accept, judge_host, config.model_dump(mode="json")]
    if not fresh and (mark := _mark(config, stages[-1], given)) and mark.exists():
        for stage in stages:
            _tell(stage, config, judge_host)
        return
    work()
    with suppress(OSError):  # it only saves time
        if mark := _mark(config, stages[-1], given):
            write_text(mark, "")


def _mark(config: Config, last: str, given: list[Any]) -> Path | None:
    """A file of the user's cache that is there once a stage was kept with everything as it is now.

    Its name is a hash of what is given, of versions, of the content of the stage's folder and those
    before it, and of path, inode, size and times of what the config names on this machine. None
    where a folder is unfinished, or a name of the hub may mean another commit today.
    """
    facts: list[Any] = [version(name) for name in PACKAGES]
    base, data = config.model, config.data
    named = [(str(base.path or base.id), base.revision), (data.source, None)]
    sets = (*data.sources, *data.benchmarks, *config.eval.tasks.values())
    with suppress(OSError):
        for name, revision in named + [(each.path, each.revision) for each in sets]:
            if name in ("", SAMPLE):
                continue
            place = Path(name).expanduser()
            found = [place] if place.exists() else map(Path, glob.glob(str(place), recursive=True))
            paths = [path for root in found for path in (root, *sorted(root.rglob("*")))]
            if not paths and not COMMIT.fullmatch(str(revision)):
                return None
            for path in paths:
                at = path.stat()
                facts.append([str(path.resolve()), at.st_ino, at.st_size, at.st_mtime_ns])
                facts.append(at.st_ctime_ns)
        for stage in [*STAGES][: [*STAGES].index(last) + 1]:
            folder = config.folders()[f"{stage}.out"]
            sealed = sha256_file(folder / STAGES[stage])
            facts.append([str(folder.resolve()), sealed, seal.manifest(folder, seal.UNREAD)])
        return cache_dir() / "kept" / sha256_json([given, facts])
    return None


def _tell(stage: str, config: Config, judge_host: str) -> None:
    """Say of a kept stage what it says itself."""
    from fintune.evals import endpoint, results
    from fintune.releasing.contents import announced

    folder = config.folders()[f"{stage}.out"]
    console.say(f"{folder}: unchanged, kept")
    if stage == "eval":
        found = results.tell(endpoint.shown_dir(config, judge_host))
        endpoint.tell_unjudged(config.eval.judge, judge_host, found)
    elif stage == "release":
        console.say(announced(read_json(folder / "training_config.json")))
