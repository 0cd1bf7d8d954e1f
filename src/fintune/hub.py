"""Repositories of the Hugging Face hub: one resolution, one download, one message for each error.

A name is resolved to a commit once (`resolve`); every later request asks for that commit, so that
a branch which moves in between cannot mix two versions. `fetch` brings files of a commit into the
hub's cache and compares every one with the hash that the hub names. Mirrors are reached by
`HF_ENDPOINT`; `HF_HUB_OFFLINE=1` opens no connection.
"""

import glob
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import WeakFileLock, get_session, tqdm  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash

from fintune import console
from fintune.errors import DataError, FintuneError, ModelError, NoSpace, OutputError
from fintune.files import FULL, cached_sha256, read_toml, require_free_space, write_text

T = TypeVar("T")
Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]*")
WAITS_S = (1, 2, 4, 8, 16, 32)
"""Between the tries of a request that the hub is too busy for; its Retry-After goes before."""
LONGEST_WAIT_S = 300
NOTICE_S = 3
"""Waiting for another process is said after this time."""
_LOCK = "fintune.lock"
SILENCE_S = 100.0
"""Timeout of a request for which the client sets none."""
BUSY = (408, 429, *range(500, 600))
_MORE_SPACE = "free some space, or set HF_HOME to another volume"
PUSH = "--repository"
"""The `setting` of a push, where nothing local could be named instead."""
SAID = read_toml(__file__, "hub.toml")
"""What happened -> what is said of it: `what`, `why`, `fix`."""
_CLASSES = {"model.path": ModelError, "release": OutputError, PUSH: OutputError}
NO_CONNECTION = (httpx2.TransportError, errors.OfflineModeIsEnabled, ConnectionError)


@dataclass(frozen=True, slots=True)
class Repository:
    """One repository at one commit.

    `revision` is the name that was resolved (a branch, a tag), None for a commit given as such.
    `setting` is the config key that a user would change, as errors name it.
    """

    kind: Kind
    id: str
    commit: str
    setting: str
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """The snapshot in the hub's cache, whether or not it is there."""
        return self._cache / "snapshots" / self.commit

    @property
    def _cache(self) -> Path:
        name = f"{self.kind}s--{self.id.replace('/', '--')}"
        return Path(constants.HF_HUB_CACHE) / name

    def files(self) -> dict[str, int]:
        """Size in bytes of every file of the commit by its path; asked for once, then cached.

        Raises:
            FintuneError: the hub refuses or cannot be reached, and the listing is not cached.
        """

        known: Any = {"repo_type": self.kind, "revision": self.commit}
        for downloaded in (False, True):
            if downloaded:  # be it nothing, as no size is known yet: the client keeps the listing
                self._download([], 0)
            with suppress(errors.CachedRepoTreeNotFoundError):
                listed = huggingface_hub.get_cached_repo_tree(self.id, **known)
                return {file.path: file.size for file in listed}
        if self.kind == "dataset":  # a shard that is missing would not be missed
            what = f"{self.id}: the cache has no list of the files of {self.commit[:12]}"
            fix = f"run once with the hub, or set {self.setting} to a local copy"
            raise DataError(what, why="some may be missing", fix=fix)
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {p.relative_to(self.folder).as_posix(): p.stat().st_size for p in paths}

    def fetch(self, patterns: list[str]) -> Path:
        """The snapshot's folder with every file that matches; what is there is not fetched again.

        Several processes that want the same repository wait for each other. A file whose content
        is not what the hub's hash says is fetched once more.

        Raises:
            FintuneError: the hub refuses, cannot be reached, or sends damaged files.
            NoSpace: too little disk.
        """
        with hub_errors(self.id, self.setting), self._alone() as locks:
            files = self.files()
            # The client never resumes what a killed download left, and locks a file while it
            # downloads that.
            for part in (self._cache / "blobs").glob("*.incomplete"):
                lock = locks / f"{part.name.partition('.')[0]}.lock"
                with suppress(OSError), WeakFileLock(lock, timeout=0.1):
                    part.unlink()
            wanted = [name for name in files if any(fnmatch(name, each) for each in patterns)]
            for _ in range(2):
                if missing := [name for name in wanted if not (self.folder / name).exists()]:
                    self._download(missing, sum(files[name] for name in missing))
                # The cache links to a blob named by the hub's ETag; of Xet that is a link again,
                # into a store of all repositories, where names are hashes of another kind.
                links = [link for name in wanted if (link := self.folder / name).is_symlink()]
                damaged = [link for link in links if has_hash(link, link.readlink().name) is False]
                if not damaged:
                    break
                for link in damaged:
                    for path in (link, link.parent / link.readlink(), link.resolve()):
                        path.unlink(missing_ok=True)
            else:
                name = damaged[0].relative_to(self.folder)
                what = f"{self.id}: {name} is damaged: its hash is not the one the hub names"
                raise _CLASSES.get(self.setting, DataError)(
                    what, fix="try another network, mirror or HF_ENDPOINT"
                )
            if self.revision:  # so that the name can be resolved offline, now that all is there
                with suppress(OSError):  # a cache that cannot be written serves what it has
                    write_text(self._cache / "refs" / self.revision, self.commit)
        return self.folder

    @contextmanager
    def _alone(self) -> Iterator[Path]:
        """Wait for other processes that fetch this repository, and keep them waiting.

        Where no lock can be made nothing can be fetched either, but all may be there already.

        Yields:
            The folder of the hub's locks.
        """
        locks = self._cache.parent / ".locks" / self._cache.name
        with ExitStack() as held:
            try:
                locks.mkdir(parents=True, exist_ok=True)
                held.enter_context(WeakFileLock(locks / _LOCK, timeout=NOTICE_S))
            except TimeoutError:
                console.say(f"another process fetches {self.id}: waiting for it")
                held.enter_context(WeakFileLock(locks / _LOCK))
            except OSError:
                pass
            yield locks

    def _download(self, names: list[str], size: int) -> None:
        require_free_space(self._cache, size, fix=_MORE_SPACE)
        exact = [glob.escape(name) for name in names]
        asked: Any = {"repo_type": self.kind, "revision": self.commit, "allow_patterns": exact}
        at = self.revision or self.commit
        failing = hub_errors(self.id, self.setting, at, console.some(names))
        with failing, _progress(self.id, size) as bar:
            self._cache.mkdir(parents=True, exist_ok=True)  # the client passes over what it cannot
            retried(lambda: huggingface_hub.snapshot_download(self.id, **asked, tqdm_class=bar))


def resolve(
    kind: Kind,
    name: str,
    revision: str | None,
    *,
    setting: str,
    recorded: str | None = None,
) -> Repository:
    """The repository at the commit that a name means.

    Args:
        revision: branch, tag or commit; None is `main`.
        setting: the config key that names a local path instead (`model.path`).
        recorded: the commit that an earlier stage or start used; it is kept, and a branch that has
            moved since is a line of notice.

    Raises:
        FintuneError: see `hub_errors`.
    """
    branch = revision or constants.DEFAULT_REVISION
    if not REVISION.fullmatch(branch):  # a name of others becomes a path in the cache
        raise _CLASSES.get(setting, DataError)(f"{branch!r} is no revision of {name}")
    fixed = recorded or (revision if revision and COMMIT.fullmatch(revision) else None)

    def ask() -> str:
        limit = constants.HF_HUB_ETAG_TIMEOUT
        api = huggingface_hub.HfApi()
        told = api.repo_info(name, repo_type=kind, revision=branch, timeout=limit)
        return COMMIT.findall(str(told.sha))[0]  # type: ignore[no-any-return]

    if fixed:
        if recorded and branch != recorded and not constants.HF_HUB_OFFLINE:
            with suppress(Exception):  # only for the notice
                if (now := ask()) != recorded:
                    moved = f"{name}: {branch} has moved to {now[:12]}"
                    _warn_once(f"{moved}; this run keeps {recorded[:12]}")
        return Repository(kind, name, fixed, setting)
    with hub_errors(name, setting, branch):
        try:
            commit = retried(ask)
        except Exception as error:
            cached = Repository(kind, name, "", setting)._cache / "refs" / branch
            away = isinstance(error, NO_CONNECTION) or _status(error) in BUSY
            commit = cached.read_text() if cached.is_file() else ""
            if not away or not COMMIT.fullmatch(commit):
                raise
            if not isinstance(error, errors.OfflineModeIsEnabled):
                _warn_once(f"the hub does not answer: {name} is the cached commit {commit[:12]}")
    return Repository(kind, name, commit, setting, branch)


def retried(request: Callable[[], T]) -> T:
    """A request's answer; a busy hub (429, 5xx) is waited for and asked again.

    Raises:
        Exception: what the client raised, of the last try. JSONDecodeError also for JSON that is
            not a hub's, over which the client stumbles in many ways.
    """
    for seconds in (*WAITS_S, None):
        try:
            try:
                return request()
            except (LookupError, TypeError, AttributeError, AssertionError) as error:
                raise json.JSONDecodeError(str(error), "", 0) from error
        except Exception as error:
            status = _status(error)
            if status not in BUSY or seconds is None:
                raise
            headers = answer.response.headers if (answer := _error_of_hub(error)) else {}
            after = str(headers.get("Retry-After", ""))
            wait = min(int(after), LONGEST_WAIT_S) if after.isdecimal() else seconds
            console.say(f"the hub answers {status}: trying again in {wait} s")
            time.sleep(wait)
    raise AssertionError("the last try answers or raises")


@contextmanager
def hub_errors(
    name: str, setting: str, revision: str | None = None, missing: str = ""
) -> Iterator[None]:
    """Raise what the hub's clients raise as one message each (see `hub_error`)."""
    try:
        get_session().timeout = httpx2.Timeout(SILENCE_S)
        yield
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError, ImportError) as error:
        lacks = missing or "all files"
        raise hub_error(error, name, setting, revision=revision, missing=lacks) from None


def hub_error(error: Exception, name: str, setting: str, **facts: Any) -> FintuneError:
    """The message for an exception of the hub's clients, without token or URL.

    Args:
        setting: `model.path`, `release`, another config key of a data set, or `PUSH`.
        facts: `revision`, and what was asked for of it: `missing`.
    """
    causes = _causes(error)
    # hf_xet has tried again itself where its text names a status.
    xet = re.search(r"HTTP status \w+ error \((\d{3})", str(causes[-1]))
    status = int(xet[1]) if xet else _status(error)
    kind, held = "model" if setting in _CLASSES else "data set", bool(_token())
    said = str(error) if status is None else getattr(_error_of_hub(error), "server_message", "")
    said = console.printable((said or "").strip().partition("\n")[0])[:200]
    place = "model.path (or --base)" if setting == "model.path" else setting
    absent = "{name} is not on this machine, or not whole (missing of {revision}: {missing})"
    absent = absent.format(name=name, **facts)
    facts |= {"name": name, "kind": kind, "status": status, "said": said}
    facts |= {"endpoint": constants.ENDPOINT, "cache": constants.HF_HUB_CACHE, "place": place}
    facts |= {"error": type(error).__name__, "cause": _reason(causes[-1])}
    facts |= {
        "page": f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{name}",
        "token": "HF_TOKEN" if held else "no token: set HF_TOKEN",
        "wants": "refuses the" if held else "wants a",
        "tries": f"also after {len(WAITS_S) + 1} tries",
        "more_space": _MORE_SPACE,
        "absent": f"{name} cannot be pushed" if setting == PUSH else absent,
        "local": "" if setting == PUSH else f", or set {place} to a local copy",
    }
    happened = _happened(causes, status, setting)
    raised = NoSpace if happened == "full" else _CLASSES.get(setting, DataError)
    return raised(**{part: text.format(**facts) for part, text in SAID[happened].items()})


def _reason(cause: BaseException) -> str:
    """The system's words, such as `Connection refused`; else the kind: a text may hold a token."""
    return getattr(cause, "strerror", None) or type(cause).__name__


def _happened(causes: list[BaseException], status: int | None, setting: str) -> str:
    """The table of hub.toml for an exception: the first that holds."""

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    unknown = is_a(errors.RepositoryNotFoundError, errors.HFValidationError)
    holds = {
        "full": any(isinstance(cause, OSError) and cause.errno in FULL for cause in causes),
        "gated": is_a(errors.GatedRepoError),
        "disabled": is_a(errors.DisabledRepoError),
        "no_revision": is_a(errors.RevisionNotFoundError),
        "unknown": unknown and setting != PUSH,
        "token": status in (401, 403),
        "moved": status == 412,
        "no_json": is_a(json.JSONDecodeError),
        "busy": status in BUSY,
        "offline": is_a(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE,
        "unreachable": status is None and is_a(*NO_CONNECTION),
        "status": status is not None,
    }
    return next((name for name in holds if holds[name]), "other")


def _token() -> str:
    """The token of this machine; none where its file cannot be read."""
    with suppress(OSError, ValueError):
        return huggingface_hub.get_token() or ""
    return ""


def token_state() -> tuple[str, str]:
    """What the hub says of this machine's token, and what to do; the token is never shown."""
    if not (token := _token()):
        return "not set", "for gated bases"
    if constants.HF_HUB_OFFLINE:
        return "set", "offline: the hub was not asked whether it is good"
    try:
        get_session().timeout = httpx2.Timeout(5)
        return f"good, of {huggingface_hub.HfApi().whoami(token)['name']}", ""
    except Exception as error:  # whatever a proxy sends in the place of an answer
        if _status(error) in (401, 403):
            return "refused by the hub", f"make one at {constants.ENDPOINT}/settings/tokens"
        return "set", f"the hub was not reached ({type(_causes(error)[-1]).__name__})"


@cache
def _warn_once(text: str) -> None:
    console.warn(text)


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    return causes


def _error_of_hub(error: BaseException) -> errors.HfHubHTTPError | None:
    return next((e for e in _causes(error) if isinstance(e, errors.HfHubHTTPError)), None)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception of the client stands for.

    502 for a page that is no JSON: the client reads some answers before their status.
    """
    if isinstance(error, json.JSONDecodeError):
        return 502
    return int(answer.response.status_code) if (answer := _error_of_hub(error)) else None


def has_hash(path: Path, digest: str) -> bool | None:
    """Whether a file is what the hub says: sha256 of large ones, git's sha1 of others.

    None for a digest of another kind: there is nothing to compare with.
    """
    if re.fullmatch("[0-9a-f]{64}", digest):
        return cached_sha256(path) == digest
    return git_hash(path.read_bytes()) == digest if COMMIT.fullmatch(digest) else None


@contextmanager
def _progress(name: str, size: int) -> Iterator[type[tqdm]]:
    """Show how much of a download has come: a bar on a terminal, else a line a minute.

    Yields:
        What the client reports to, in the place of its own bars.
    """
    with console.meter(f"fetching {name}", size, download=True) as meter:

        class Bar(tqdm):
            def __init__(self, *args: Any, name: str = "", **options: Any) -> None:
                super().__init__(*args, **options | {"disable": True})  # type: ignore[no-untyped-call]
                # The client has three: files, bytes of the network, bytes on the disk.
                self.counted = name == "huggingface_hub.snapshot_download"

            def update(self, n: float | None = 1) -> None:
                if self.counted:
                    meter.advance(int(n or 0))

        if size:
            console.say(f"fetching {name}: {size / 1e6:,.1f} MB")
        yield Bar
