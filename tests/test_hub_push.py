"""`fintune export push` through the real clients, to a hub on loopback, over LFS and Xet."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_hub
from hub.server import Hub
from hub.storage import Repo
from tiny_release import built

EVERY = bool(os.environ.get("FINTUNE_TEST_ALL"))
ID = "alice/adapter"
NOW = {"Retry-After": "0"}
ADAPTER = "adapter_model.safetensors"


class Client:
    """A hub, a release, and commands that push it with alice's token."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.release, self.base = built()

    def words(self, *more: object, folder: Path | None = None, to: str = ID) -> list[object]:
        given = ("--repository", to, "--base", self.base, "--really")
        return ["export", "push", folder or self.release, *given, *more]

    def push(
        self, *more: object, token: str = "hf_alice", xet: bool = False, **where: Any
    ) -> tiny.Said:
        with tiny_hub.client(self.hub, self.home, token, xet=xet):
            return tiny.fintune(*self.words(*more, **where))

    @property
    def repo(self) -> Repo:
        return self.hub.repos["model", ID]

    def commits(self) -> list[str]:
        """Titles of main's commits, newest first."""
        return [row["title"] for row in self.repo.history(ID, self.repo.at("main"))]

    def main(self) -> dict[str, str]:
        """Every file of main, but what the hub makes, and its sha256."""
        files = self.repo.at("main").files
        return {name: blob.sha256 for name, blob in files.items() if name != ".gitattributes"}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with Hub(tmp_path / "hub") as hub:
        hub.tokens |= {"hf_alice": ["alice", "acme"], "hf_bob": ["bob"]}
        hub.tokens["hf_read"] = ["alice", "read-only"]
        yield Client(hub, tmp_path / "home")


FIRST = ["A release of fintune", "initial commit"]


def content(client: Client, to: str = ID) -> dict[str, bytes]:
    """What main must hold: the release, with the repository in the card and the card's new hash."""
    data = {path.name: path.read_bytes() for path in client.release.iterdir()}
    card, old = data["README.md"].decode(), hashlib.sha256(data["README.md"]).hexdigest()
    assert (card.count('adapter = "."'), card.count("--lora-modules tiny=.")) == (2, 1)
    card = card.replace('adapter = "."', f'adapter = "{to}"')
    card = card.replace("--lora-modules tiny=.", f"--lora-modules tiny={to}")
    new, sums = hashlib.sha256(card.encode()).hexdigest(), data["SHA256SUMS"].decode()
    assert sums.count(f"{old}  README.md") == 1
    return data | {"README.md": card.encode(), "SHA256SUMS": sums.replace(old, new).encode()}


def pushed(client: Client) -> dict[str, str]:
    """The same as hashes."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in content(client).items()}


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_push_is_one_commit_of_the_release_and_private(client: Client, xet: bool) -> None:
    said = client.push(xet=xet)
    assert said.code == 0, said.err
    head = client.repo.at("main")
    assert said.out.strip() == f"{client.hub.url}/{ID}/commit/{head.id}"
    assert "alice/adapter (private): 14 files pushed" in said.err
    assert (client.commits(), client.repo.private) == (FIRST, True)
    assert client.main() == pushed(client)
    assert (head.files[ADAPTER].xet is not None) == xet
    assert "hf_alice" not in said.err + said.out


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_second_push_commits_and_uploads_nothing(client: Client, xet: bool) -> None:
    assert client.push(xet=xet).code == 0
    client.hub.log.clear()
    said = client.push(xet=xet)
    assert (said.code, client.commits()) == (0, FIRST), said.err
    assert "holds this release already" in said.err
    assert not client.hub.requests("POST|PUT")


def test_a_new_release_removes_what_an_older_one_left(client: Client, tmp_path: Path) -> None:
    left = {"training_args.bin": b"\x80pickle", "sub/optimizer.pt": b"p", "x [1]*.txt": b"x"}
    client.hub.commit("model", ID, {"README.md": b"old", ".gitattributes": b"# hub's\n", **left})
    client.repo.private = True
    said = client.push()
    assert said.code == 0, said.err
    assert client.main() == pushed(client)
    assert client.repo.at("main").files[".gitattributes"].path.read_bytes() == b"# hub's\n"
    assert client.commits() == ["A release of fintune", "commit"]


def test_an_existing_public_repository_needs_public(client: Client) -> None:
    client.hub.commit("model", ID, {"README.md": b"seen by all"})
    said = client.push()
    assert (said.code, client.commits()) == (1, ["commit"])
    assert (
        "alice/adapter is public: everyone could read this release" in said.err
        and "--public" in said.err
    )
    said = client.push("--public")
    assert (said.code, client.repo.private) == (0, False), said.err
    assert "alice/adapter (public)" in said.err and client.main() == pushed(client)


def test_public_makes_a_new_one_public_and_leaves_a_private_one_private(client: Client) -> None:
    assert client.push("--public", to="acme/open").code == 0
    assert not client.hub.repos["model", "acme/open"].private
    assert client.push().code == 0
    said = client.push("--public")
    assert client.repo.private and "alice/adapter (private)" in said.err


def test_nothing_is_asked_without_really_or_of_a_changed_release(
    client: Client, tmp_path: Path
) -> None:
    with tiny_hub.client(client.hub, client.home, "hf_alice"):
        words = client.words("--public")
        words.remove("--really")
        said = tiny.fintune(*words)
        assert said.out.startswith("would upload to alice/adapter (public): README.md, SHA")
    broken = Path(shutil.copytree(client.release, tmp_path / "broken"))
    (broken / ".env").write_text("HF_TOKEN=hf_x")
    assert client.push(folder=broken).code == 3
    assert not client.hub.log


@pytest.mark.parametrize(
    "name", ["adapter", "", "a/b/c", "alice/--x", "alice/../x", "alice/x\x1b[2J"]
)
def test_a_name_that_is_none_makes_no_repository(client: Client, name: str) -> None:
    said = client.push(to=name)
    assert said.code == 1 and "Traceback" not in said.err and "\x1b[2J" not in said.err
    assert not client.hub.repos and not client.hub.log
    assert ("names no owner" in said.err) == ("/" not in name)


def test_a_copy_from_the_hub_is_pushed_without_the_hubs_files(
    client: Client, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(client.release, tmp_path / "copy"))
    (copy / ".gitattributes").write_text("* text\n")
    (copy / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / ".gitignore").write_text("*")
    assert client.push(folder=copy).code == 0
    assert client.main() == pushed(client)
    assert client.repo.at("main").files[".gitattributes"].path.read_text() != "* text\n"


LFS = {"method": "PUT", "path": "/lfs/"}
BATCH = {"method": "POST", "path": "/objects/batch"}
COMMIT = {"method": "POST", "path": "/commit/"}
CREATE = {"method": "POST", "path": "/repos/create"}
INFO = {"method": "GET", "path": f"/api/models/{ID}"}
PREUPLOAD = {"method": "POST", "path": "/preupload/"}
CARD = {"method": "POST", "path": "/validate-yaml"}
PLACES = {"info": INFO, "create": CREATE, "card": CARD, "preupload": PREUPLOAD, "commit": COMMIT}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("place", PLACES)
def test_a_busy_hub_is_waited_for(client: Client, place: str, status: int) -> None:
    client.hub.fault(**PLACES[place], status=status, headers=NOW, times=2)
    said = client.push()
    assert (said.code, client.commits(), client.main()) == (0, FIRST, pushed(client)), said.err
    assert ("trying again in" in said.err) == (place != "preupload")  # there the client waits


def test_a_commit_whose_answer_is_503_is_made_once(client: Client) -> None:
    """A gateway's 503 may come after the hub did what was asked."""
    files = content(client)
    done = lambda: client.hub.commit("model", ID, files, FIRST[0])  # noqa: E731
    client.hub.fault(**COMMIT, status=503, headers=NOW, call=done)
    said = client.push()
    assert (said.code, client.commits()) == (0, FIRST), said.err
    assert len(client.hub.requests(**COMMIT)) == 1


def test_a_commit_whose_answer_is_lost_is_made_once(client: Client) -> None:
    client.hub.fault(**COMMIT, lose=True)
    said = client.push()
    assert (said.code, client.commits()) == (1, FIRST), said.err
    assert "alice/adapter cannot be pushed, and the hub cannot be reached" in said.err
    assert "Traceback" not in said.err
    said = client.push()
    assert (said.code, client.commits(), client.main()) == (0, FIRST, pushed(client)), said.err
    assert "holds this release already" in said.err


def test_a_creation_whose_answer_is_lost_goes_on(client: Client) -> None:
    client.hub.fault(**CREATE, lose=True)
    assert client.push().code == 1 and client.commits() == FIRST[1:]
    said = client.push()
    assert (said.code, client.commits(), client.repo.private) == (0, FIRST, True), said.err


def test_a_commit_of_someone_else_meanwhile_is_not_undone(client: Client) -> None:
    assert client.push().code == 0
    client.hub.commit("model", ID, {"more.txt": b"x"}, "mine")
    theirs = lambda: client.hub.commit("model", ID, {"theirs.txt": b"y"}, "theirs")  # noqa: E731
    client.hub.fault(**COMMIT, call=theirs)
    said = client.push()
    assert (said.code, client.commits()) == (1, ["theirs", "mine", *FIRST]), said.err
    assert "main has moved since this push began, and nothing was committed" in said.err
    assert client.push().code == 0 and client.main() == pushed(client)


def test_files_that_the_repository_ignores_are_noticed(client: Client) -> None:
    """Its .gitignore would keep the weights out of the commit, in silence."""
    client.hub.fault(
        **PREUPLOAD,
        status=200,
        body=json.dumps(
            {
                "files": [
                    {"path": name, "uploadMode": "lfs", "shouldIgnore": name == ADAPTER}
                    for name in content(client)
                ]
            }
        ).encode(),
    )
    said = client.push()
    assert (said.code, "alice/adapter does not hold what was pushed" in said.err) == (1, True)


DISK = b'{"error": "Private repository storage limit reached, \\u001b[2Jupgrade your plan"}'
JSON = {"Content-Type": "application/json"}
REFUSED = "the hub refuses the token for alice/adapter (HTTP 403)"
ERRORS: dict[str, tuple[dict[str, Any], str, bool, list[str]]] = {
    "no token": ({}, "", False, ["the hub wants a token for alice/adapter", "set HF_TOKEN"]),
    "a refused token": ({}, "hf_old", False, ["the hub refuses the token for", "HTTP 401"]),
    "a token that only reads": ({}, "hf_read", False, [REFUSED, "rights to create a repository"]),
    "the namespace of another": ({}, "hf_bob", False, [REFUSED, "rights to create a repository"]),
    "LFS refuses": (LFS | {"status": 403}, "hf_alice", False, [REFUSED]),
    "LFS too large": (LFS | {"status": 413}, "hf_alice", False, ["alice/adapter: HTTP 413"]),
    "LFS batch refuses": (BATCH | {"status": 403}, "hf_alice", False, [REFUSED]),
    "Xet token refused": (
        {"method": "GET", "path": "/xet-write-token/", "status": 403}, "hf_alice", True, [REFUSED]
    ),
    "Xet refuses": (
        {"method": "POST", "path": "/v1/xorbs", "status": 403}, "hf_alice", True, [REFUSED]
    ),
    "Xet too large": (
        {"method": "POST", "path": "/v1/shards", "status": 413}, "hf_alice", True, ["HTTP 413"]
    ),
    "quota": (
        COMMIT | {"status": 403, "body": DISK, "headers": JSON},
        "hf_alice",
        False,
        [REFUSED, "Private repository storage limit reached, \\x1b[2Jupgrade"],
    ),
    "payment": (
        CREATE | {"status": 402, "body": DISK, "headers": JSON},
        "hf_alice",
        False,
        ["alice/adapter: HTTP 402", "storage limit reached"],
    ),
    "a card that is refused": (
        CARD | {"status": 400, "body": b'{"errors": [{"message": "no such licence"}]}'},
        "hf_alice",
        False,
        ["no such licence"],
    ),
    "closed connections": (INFO | {"close": True}, "hf_alice", False, ["hub cannot be reached"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_every_refusal_is_one_message(client: Client, name: str) -> None:
    fault, token, xet, named = ERRORS[name]
    if fault:
        client.hub.fault(**fault, times=-1)
    said = client.push(token=token, xet=xet)
    assert said.code == 1, said.err
    assert "Traceback" not in said.err and "\x1b" not in said.err
    for text in named:
        assert text in said.err, said.err
    assert said.err.count("error: ") == 1 and "hf_alice" not in said.err
    if ("model", ID) in client.hub.repos:  # it was made, and that was said
        assert client.commits() == FIRST[1:]
        assert "alice/adapter is new; until its first commit it is empty" in said.err
    client.hub.faults.clear()
    said = client.push()
    assert (said.code, client.commits(), client.main()) == (0, FIRST, pushed(client)), said.err


def test_json_that_is_no_hubs_makes_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fintune.hub.WAITS_S", (0, 0))
    client.hub.fault(**INFO, status=200, body=b"{}", times=-1)
    said = client.push()
    assert said.code == 1 and "no JSON of a hub" in said.err and not client.hub.repos, said.err


def test_a_hub_that_is_not_there(client: Client) -> None:
    client.hub.stop()
    said = client.push()
    assert said.code == 1 and "alice/adapter cannot be pushed, and the hub cannot be" in said.err
    assert "Traceback" not in said.err and len(said.err.splitlines()) < 8


def test_a_silent_hub_is_not_waited_for_without_end(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fintune.hub.SILENCE_S", 1.0)
    client.hub.fault(**COMMIT, delay=4)
    said = client.push()
    assert said.code == 1 and "and the hub cannot be reached" in said.err, said.err
    time.sleep(4)  # the commit is made all the same
    said = client.push()
    assert (said.code, client.commits(), client.main()) == (0, FIRST, pushed(client)), said.err


def test_offline_is_said(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tiny.fintune(*client.words())  # the tests' own HF_HUB_OFFLINE
    assert said.code == 1 and "and the hub is off (offline)" in said.err, said.err


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_killed_at_any_request_the_same_command_ends_with_one_commit(
    client: Client, tmp_path: Path, xet: bool
) -> None:
    """SIGKILL as the hub takes the n-th request: nothing is done then, or its answer is lost."""
    processes: list[tiny.Forked] = []

    def run() -> int:
        with tiny_hub.client(client.hub, client.home, "hf_alice", xet=xet):
            processes.append(tiny.Forked(*client.words(), log=tmp_path / "log"))
        return processes[-1].wait()

    def kill() -> None:
        processes[-1].send(signal.SIGKILL)
        time.sleep(0.05)

    assert run() == 0, processes[-1].text()
    requests = len(client.hub.log)
    assert requests >= 10
    moments = [(at, done) for done in (False, True) for at in range(requests)]
    for at, done in moments if EVERY else [moments[2], moments[requests - 3], moments[-2]]:
        for objects in (client.hub.repos, client.hub.lfs, client.hub.xet):
            objects.clear()  # type: ignore[attr-defined]
        client.home = tmp_path / f"home-{at}-{done}"  # hf_xet remembers what it has sent
        client.hub.fault(skip=at, call=kill, close=not done, lose=done)
        assert run() == -signal.SIGKILL, f"request {at}: {processes[-1].text()}"
        assert run() == 0, f"after request {at}: {processes[-1].text()}"
        assert (client.commits(), client.main()) == (FIRST, pushed(client)), f"request {at}"
        client.hub.faults.clear()
