"""What the hub for tests keeps: repositories, commits, files, LFS objects and Xet's shards."""

import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
from hf_xet import XetFileInfo, XetSession  # type: ignore[import-untyped]
from huggingface_hub.utils.sha import git_hash

# Stored as LFS: these suffixes, files above 10 MB, a zero byte in the first 512.
LFS = (".safetensors", ".bin", ".pt", ".gguf", ".parquet", ".arrow", ".zip", ".gz", ".npy", ".pkl")
ATTRIBUTES = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS).encode()

XET, OWN = "token-of-xet", "token-of-the-hub"  # sent to storage; OWN is the hub's own reading
DATE = "2026-01-01T00:00:00.000Z"
READ_ONLY = "read-only"  # among the names of a token: it cannot write
Term = tuple[str, int, int, int]  # of a Xet file: xorb, bytes, first chunk, last chunk + 1


class Refusal(Exception):
    """An answer of status 4xx, with the hub's X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


@dataclass
class Blob:
    """A file's contents; a test may raise `size` to claim more than the body has."""

    path: Path
    size: int
    sha256: str
    lfs: bool
    oid: str  # git's: of the contents, of the pointer where they are stored as LFS
    xet: str | None = None

    def entry(self, path: str) -> dict[str, Any]:
        """The row of a listing; the keys of both spellings, `oid` of tree and `blobId` of info."""
        found = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        found |= {"rfilename": path, "blobId": self.oid}
        if self.lfs:
            pointer = {"oid": self.sha256, "sha256": self.sha256, "pointerSize": 134}
            found |= {"lfs": pointer | {"size": self.size}}
        return found | ({"xetHash": self.xet} if self.xet else {})


Files = Mapping[str, bytes | Path | Blob | None]


class Commit(NamedTuple):
    id: str
    parent: str | None
    message: str
    files: dict[str, Blob]

    def card(self) -> dict[str, Any]:
        return card(self.files["README.md"].path.read_text()) if "README.md" in self.files else {}

    def entries(self) -> dict[str, dict[str, Any]]:
        """The rows of all files and folders by path."""
        rows = {name: blob.entry(name) for name, blob in self.files.items()}
        for folder in {str(p) for name in self.files for p in PurePath(name).parents} - {"."}:
            oid = hashlib.sha1(folder.encode()).hexdigest()
            rows[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
        return dict(sorted(rows.items()))

    def below(self, folder: str, deep: bool) -> list[dict[str, Any]]:
        top = f"{folder}/" if folder else ""
        rows = [row for path, row in self.entries().items() if path.startswith(top)]
        if top and not rows:
            raise Refusal(404, f"{folder} does not exist on this revision", "EntryNotFound")
        return [row for row in rows if deep or "/" not in row["path"][len(top) :]]

    def upload_modes(self, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """How each file of a push is to come; `oid` is what the commit has under its path."""
        rows = []
        for file in asked:
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            row = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular"}
            if old := self.files.get(file["path"]):
                row["oid"] = old.sha256 if old.lfs else old.oid
            rows.append({**row, "shouldIgnore": False})
        return rows


@dataclass
class Repo:
    """`gated` is False, "auto" or "manual"; users in `accepted` read it, private or gated."""

    private: bool = False
    gated: str | bool = False
    accepted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1

    def at(self, revision: str) -> Commit:
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        found = next((self.refs[name] for name in names if name in self.refs), revision)
        if found not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found]

    def info(
        self, repo_id: str, commit: Commit, expand: list[str] | None, *, blobs: bool
    ) -> dict[str, Any]:
        """The answer to model_info and dataset_info."""
        about = commit.card()
        kept = ("rfilename", "size", "blobId", "lfs") if blobs else ("rfilename",)
        rows = [blob.entry(name) for name, blob in sorted(commit.files.items())]
        licence = [f"license:{about['license']}"] if "license" in about else []
        told = {"sha": commit.id, "lastModified": DATE, "createdAt": DATE, "disabled": False}
        told |= {"private": self.private, "gated": self.gated, "cardData": about}
        told |= {"tags": [*(about.get("tags") or []), *licence], "author": repo_id.split("/")[0]}
        told |= {"siblings": [{key: row[key] for key in kept if key in row} for row in rows]}
        told |= {key: about[key] for key in ("library_name", "pipeline_tag") if key in about}
        told = {key: value for key, value in told.items() if not expand or key in expand}
        return {"_id": repo_id, "id": repo_id} | told

    def branches_and_tags(self) -> dict[str, Any]:
        told: dict[str, Any] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, commit in self.refs.items():
            _, group, name = ref.split("/", 2)
            row = {"name": name, "ref": ref, "targetCommit": commit}
            told["branches" if group == "heads" else "tags"].append(row)
        return told

    def history(self, repo_id: str, commit: Commit) -> list[dict[str, Any]]:
        authors = [{"user": repo_id.split("/")[0]}]
        row = {"id": commit.id, "title": commit.message, "message": "", "date": DATE}
        older = self.history(repo_id, self.commits[commit.parent]) if commit.parent else []
        return [row | {"authors": authors}, *older]


class Storage:
    """Repositories by kind ("model", "dataset") and id, and the objects they share."""

    def __init__(self, folder: Path) -> None:
        self.objects = folder / ".objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, Blob] = {}  # by sha256
        self.xet: dict[str, list[Term]] = {}  # by Xet hash
        self.lock = threading.RLock()
        for path in sorted(folder.glob("*s/*/*"), key=lambda path: ("@" not in path.name, path)):
            files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
            name, _, tag = path.name.partition("@")
            key = path.parts[-3].removesuffix("s"), f"{path.parent.name}/{name}"
            old = self.repos[key].at("main").files if key in self.repos else {}
            made = self.commit(*key, {**dict.fromkeys(old), **files}, tag or "main")
            self.repos[key].refs |= {f"refs/tags/{tag}": made} if tag else {}

    def access(self, kind: str, repo_id: str, names: list[str], need: str) -> Repo:
        """The repository, or the hub's refusal, for a user with these names.

        `names` are the user and the organizations, [] without a token; `need` is "read" (rows of
        listings), "files" (their contents) or "write".
        """
        repo, known = self.repos.get((kind, repo_id)), bool(names)
        mine = repo_id.split("/")[0] in names
        if repo is None or not (mine or not repo.private or repo.accepted & {*names}):
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        if need == "write" and (not mine or READ_ONLY in names):
            raise Refusal(403 if known else 401, "You don't have write access to this repository")
        if need == "files" and repo.gated and not mine and not repo.accepted & {*names}:
            text = "must have access to it and be authenticated to access it. Please log in."
            if known:
                text = "are not in the authorized list. Visit its page to ask for access."
            text = f"Access to {kind} {repo_id} is restricted. You {text}"
            raise Refusal(403 if known else 401, text, "GatedRepo")
        return repo

    def commit(
        self, kind: str, repo_id: str, files: Files, message: str = "commit", branch: str = "main"
    ) -> str:
        """Add a commit, and its repository where there is none; None deletes. Returns its id."""
        new = {name: self.blob(name, data) for name, data in files.items() if data is not None}
        with self.lock:
            repo, ref = self.repos.setdefault((kind, repo_id), Repo()), f"refs/heads/{branch}"
            parent = repo.refs.get(ref)
            old = repo.commits[parent].files if parent else {}
            tree = new | {name: blob for name, blob in old.items() if name not in files}
            listed = sorted((name, blob.oid) for name, blob in tree.items())
            text = json.dumps([kind, repo_id, parent, message, listed])
            made = hashlib.sha1(text.encode()).hexdigest()
            repo.commits[made], repo.refs[ref] = Commit(made, parent, message, tree), made
        return made

    def blob(self, name: str, data: bytes | Path | Blob, xet: str | None = None) -> Blob:
        """The blob of contents; a file is served from where it lies."""
        if isinstance(data, Blob):
            return data
        if isinstance(data, bytes):
            path = self.objects / hashlib.sha256(data).hexdigest()
            path.write_bytes(data)
            data = path
        with data.open("rb") as file:
            size, sample = data.stat().st_size, file.read(512)
            file.seek(0)
            oid = hashlib.file_digest(file, "sha256").hexdigest()
        if not xet and not is_lfs(name, size, sample):
            return Blob(data, size, oid, False, git_hash(data.read_bytes()))
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
        made = Blob(data, size, oid, True, git_hash(pointer.encode()), xet)
        return self.lfs.setdefault(oid, made)

    def apply(self, kind: str, repo_id: str, branch: str, rows: list[dict[str, Any]]) -> str:
        """Make the commit that the rows of a push describe, or refuse it whole."""
        files: dict[str, bytes | Path | Blob | None] = {}
        with self.lock:
            head = self.repos[kind, repo_id].at(branch)
            for key, value in ((row["key"], row["value"]) for row in rows):
                path = value.get("path", "")
                if key == "header" and value.get("parentCommit", head.id) != head.id:
                    text = "A commit has happened since. Please refresh and try again."
                    raise Refusal(412, text)
                if key == "file":
                    files[path] = base64.b64decode(value["content"])
                elif key == "lfsFile" and value["oid"] not in self.lfs:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                elif key == "lfsFile":
                    files[path] = self.lfs[value["oid"]]
                elif key.startswith("deleted"):
                    top = path.rstrip("/")
                    gone = [n for n in head.files if n == path or n.startswith(f"{top}/")]
                    if not gone:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                    files |= dict.fromkeys(gone)
            return self.commit(kind, repo_id, files, rows[0]["value"]["summary"], branch)

    def register(self, shard: bytes, url: str) -> None:
        """Keep a Xet push's files; the real client fetches each once, to be served without Xet."""
        for name, terms in shard_files(shard):
            self.xet[name], path, end = terms, self.objects / name, int(time.time()) + 3600
            access = {"endpoint": url, "token": OWN, "token_expiry_unix_secs": end}
            with XetSession().new_file_download_group(**access) as group:
                size = sum(term[1] for term in terms)
                group.start_download_file(XetFileInfo(name, size), str(path))
            self.blob("", path, name)

    def reconstruction(
        self, name: str, start: int, end: int, url: str, suffix: str
    ) -> dict[str, Any]:
        """Where the chunks lie of the terms of a Xet file that overlap bytes start to end."""
        terms: list[dict[str, Any]] = []
        fetch: dict[str, list[dict[str, Any]]] = {}
        at = skipped = 0
        for xorb, size, first, last in self.xet.get(name, []):
            if at <= end and at + size > start:
                skipped = skipped if terms else max(start - at, 0)
                chunks = {"start": first, "end": last}
                offsets = chunk_offsets((self.objects / xorb).read_bytes())
                span = {"start": offsets[first], "end": offsets[last] - 1}
                terms.append({"hash": xorb, "unpacked_length": size, "range": chunks})
                row = {"range": chunks, "url": f"{url}/v1/xorbs/{xorb}{suffix}", "url_range": span}
                fetch.setdefault(xorb, []).append(row)
            at += size
        if not terms:
            raise Refusal(416 if name in self.xet else 404, "no such file, or beyond its end")
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetch}


def is_lfs(name: str, size: int, sample: bytes) -> bool:
    return size > 0 and (name.endswith(LFS) or size > 10_000_000 or b"\0" in sample)


def card(text: str) -> dict[str, Any]:
    """The front matter of a README, {} where there is none; raises yaml.YAMLError."""
    found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return dict(yaml.safe_load(found[1]) or {}) if found else {}


def shard_files(shard: bytes) -> Iterator[tuple[str, list[Term]]]:
    """The files of a Xet shard (huggingface/xet-core, metadata_shard/file_structs.rs).

    Records of 48 bytes behind a header of 48: a file's hash, flags and number of terms, its terms,
    as many verification records where bit 31 is set, one of metadata where bit 30 is.
    """

    def hexadecimal(at: int) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, at))

    at = 48
    while shard[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<2I", shard, at + 32)
        rows = range(at + 48, at + 48 * (1 + count), 48)
        yield (
            hexadecimal(at),
            [(hexadecimal(row), *struct.unpack_from("<3I", shard, row + 36)) for row in rows],
        )
        at += 48 * (1 + count * (1 + (flags >> 31)) + (flags >> 30 & 1))


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where the chunks of a xorb begin, and where the last one ends: 8 bytes of header each."""
    offsets = [0]
    while offsets[-1] + 8 <= len(xorb) and xorb[offsets[-1]] == 0:  # the format's version
        at = offsets[-1]
        offsets.append(at + 8 + int.from_bytes(xorb[at + 1 : at + 4], "little"))
    return offsets
