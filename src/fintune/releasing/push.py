"""A release on the hub: one commit on `main` that holds exactly this release, or no commit.

What is pushed differs from the folder in two files: the card names the repository where it named
the adapter, and SHA256SUMS has the new card's hash, so that `fintune verify` passes on both.
"""

import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants
from huggingface_hub.errors import RepositoryNotFoundError

from fintune import console, files
from fintune.errors import OutputError
from fintune.hub import PUSH, has_hash, hub_errors, retried
from fintune.releasing.contents import announced
from fintune.stop import STOP
from fintune.untrusted import checks


def push_release(folder: Path, repository: str, *, public: bool) -> str:
    """Make `main` of a model repository this release.

    A repository that is not there is made, private unless `public`. Files of an older release are
    removed in the same commit. Where `main` holds these files already, nothing is committed.

    Returns:
        The page of the commit.

    Raises:
        OutputError: the hub refuses or cannot be reached, the repository is public, or its `main`
            moved meanwhile.
    """
    console.say(announced(checks.read_object(folder, checks.CONFIG, absent=True)))
    api, page = HfApi(), f"{constants.ENDPOINT}/{repository}"
    look = partial(api.model_info, repository, files_metadata=True)
    STOP.guard()
    with tempfile.TemporaryDirectory() as changed, hub_errors(repository, PUSH):
        try:
            start = retried(look)
        except RepositoryNotFoundError:
            retried(lambda: api.create_repo(repository, private=not public, exist_ok=True))
            console.say(f"{repository} is new; until its first commit it is empty")
            start = retried(look)
        if not (start.private or public):
            what = f"{repository} is public: everyone could read this release"
            raise OutputError(what, fix="--public if that is meant, else another --repository")
        data = _published(folder, repository, Path(changed))
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in data.items()]
        older = sorted(_listed(start).keys() - data.keys())
        operations += [CommitOperationDelete(name, is_folder=False) for name in older]
        commit = partial(api.create_commit, repository, operations, parent_commit=start.sha)

        def once() -> ModelInfo:
            # Asked at every try, since the answer to a commit that was made may have been lost.
            if not _holds(now := look(), data):
                commit(commit_message="A release of fintune")
                now = look()
            return now

        if not _holds(now := retried(once), data):
            raise OutputError(f"{repository} does not hold what was pushed", fix=f"see {page}")
    did = "holds this release already" if now.sha == start.sha else f"{len(data)} files pushed"
    console.say(f"{repository} ({'private' if now.private else 'public'}): {did}")
    return f"{page}/commit/{now.sha}"


def _published(folder: Path, repository: str, changed: Path) -> dict[str, Path]:
    """The files to push by name; those that differ from the folder's are written to `changed`."""
    data = {path.name: path for path in checks.entries(folder)}
    if {checks.CARD, checks.SUMS} <= data.keys():
        card, sums = (checks.read_text(folder, name) for name in (checks.CARD, checks.SUMS))
        named = re.sub(r'(?m)^adapter = ".*"$', f'adapter = "{repository}"', card)
        named = re.sub(r"(--lora-modules [^\s=]+=)\S+", rf"\g<1>{repository}", named)
        old, new = (files.sha256_bytes(text.encode()) for text in (card, named))
        sums = sums.replace(old, new)
        for name, text in ((checks.CARD, named), (checks.SUMS, sums)):
            data[name] = changed / name
            files.write_text(data[name], text)
    return data


def _listed(info: ModelInfo) -> dict[str, str]:
    """Hash of every file of a commit but the hub's own: sha256 of large ones, git's of others."""
    files = [file for file in info.siblings or [] if file.rfilename not in checks.HUB_FILES]
    return {f.rfilename: f.lfs.sha256 if f.lfs else str(f.blob_id) for f in files}


def _holds(info: ModelInfo, data: dict[str, Path]) -> bool:
    listed = _listed(info)
    return listed.keys() == data.keys() and all(has_hash(data[n], listed[n]) for n in data)
