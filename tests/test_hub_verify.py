"""`fintune verify` of what strangers have: downloads, the hub cache's snapshot, a hub id."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_hub
from hub.server import Hub
from huggingface_hub import snapshot_download
from tiny_release import built, rewrite_sums

ID, BASE_ID = "alice/adapter", "fintune/tiny"
CARD = b"---\nlicense: mit\n---\n"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with the release, as it was pushed, and its base."""
    release, base = built()
    with Hub(tmp_path / "served") as hub:
        hub.tokens["hf_alice"] = ["alice"]
        hub.commit("model", BASE_ID, {path.name: path for path in base.iterdir()})
        words = ("--repository", ID, "--base", base, "--really")
        with tiny_hub.client(hub, tmp_path / "alice", "hf_alice"):
            tiny.done("export", "push", release, *words)
        hub.repos["model", ID].private = False
        hub.log.clear()
        yield hub


@pytest.fixture
def stranger(hub: Hub, tmp_path: Path) -> Iterator[Path]:
    """The home of someone without a token, whose clients know the hub."""
    with tiny_hub.client(hub, tmp_path / "stranger"):
        yield tmp_path / "stranger"


def refused(folder: object, named: str, *words: object) -> None:
    said = tiny.fintune("verify", folder, "--base", built()[1], *words)
    assert (said.code, named in said.err, "Traceback" in said.err) == (3, True, False), said.err


def test_a_download_and_a_snapshot_are_verified(stranger: Path, tmp_path: Path) -> None:
    snapshot = Path(snapshot_download(ID))
    local = Path(snapshot_download(ID, local_dir=tmp_path / "local"))
    assert (local / ".cache" / "huggingface").is_dir() and (local / ".gitattributes").is_file()
    assert (snapshot / "README.md").is_symlink()
    for folder in (local, snapshot):
        tiny.done("verify", folder, "--base", built()[1])
        found = tiny.answer_json("verify", folder, "--base", built()[1], "--no-pickle")
        assert {c["status"] for c in found if c["name"] not in tiny.GATE} == {"ok"}
        assert found[0]["detail"].startswith("14 files")


def test_an_id_is_verified_with_the_base_that_it_names(hub: Hub, stranger: Path) -> None:
    said = tiny.done("verify", ID)
    assert f"{ID}: verified" in said.out and f"{ID} at commit " in said.err
    assert (stranger / "hub" / "models--fintune--tiny").is_dir()
    asked = len(hub.log)
    commit = hub.repos["model", ID].at("main").id
    for name in (f"{ID}@main", f"{ID}@{commit}"):
        assert tiny.done("verify", name).code == 0
    assert not [r for r in hub.log[asked:] if r.sent > 5000], "nothing is fetched twice"


def test_an_id_is_that_of_its_revision(hub: Hub, stranger: Path) -> None:
    old = hub.repos["model", ID].at("main").id
    hub.repos["model", ID].refs["refs/tags/v1"] = old
    hub.commit("model", ID, {"adapter_model.safetensors": b"damaged"})
    for name in (f"{ID}@v1", f"{ID}@{old}"):
        tiny.done("verify", name, "--base", built()[1])
    refused(ID, "adapter is refused: ")


def test_chat_and_export_take_an_id(hub: Hub, stranger: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    tiny.done("export", "merged", ID, "--out", out)
    assert (out / "model.safetensors").is_file()
    assert "vllm serve fintune/tiny" in tiny.done("export", "vllm", ID).out


@pytest.mark.parametrize("name", ["optimizer.pt", "evil.py", "sub/README.md", ".env", "x\x1b[2Jy"])
def test_a_repository_with_other_files_is_refused_and_not_fetched(
    hub: Hub, stranger: Path, name: str
) -> None:
    hub.commit("model", ID, {name: b"0" * 20_000_000})
    hub.log.clear()
    refused(ID, f"{ID} holds what no release does: ")
    assert hub.sent < 1_000_000
    said = tiny.fintune("export", "vllm", ID)
    assert said.code == 3 and "\x1b" not in said.err + said.out
    found = json.loads(tiny.fintune("verify", ID, "--json").out)
    assert [check["status"] for check in found] == ["failed"]


def test_what_is_not_there_is_one_message(hub: Hub, stranger: Path) -> None:
    for name, named in (
        ("alice/none", "the hub knows no model alice/none, and there is no such local path"),
        (f"{ID}@v9", "alice/adapter has no revision v9"),
        (f"{ID}@../x", "'../x' is no revision of alice/adapter"),
        (f"{ID}@{'0' * 40}", "alice/adapter has no revision 0000"),
    ):
        said = tiny.fintune("verify", name)
        assert (said.code, named in said.err, "Traceback" in said.err) == (1, True, False), said.err
    hub.stop()
    said = tiny.fintune("verify", ID)
    assert said.code == 1 and "and the hub cannot be reached" in said.err, said.err


def test_what_the_hub_does_not_give_is_one_message(hub: Hub, stranger: Path) -> None:
    repo = hub.repos["model", ID]
    for change, fault, named in (
        ({"gated": "auto"}, {}, f"{ID} is gated: its licence must be accepted first"),
        ({"private": True}, {}, f"the hub knows no model {ID}, and there is no such local path"),
        ({}, {"path": "/api/models/", "status": 503}, f"the hub answers 503 for {ID}, also after"),
        ({}, {"path": "/cdn/", "flip": 900}, "is damaged: its hash is not the one the hub names"),
    ):
        vars(repo).update({"gated": False, "private": False} | change)
        hub.faults.clear()
        if fault:
            hub.fault("GET", headers={"Retry-After": "0"}, times=-1, **fault)
        said = tiny.fintune("verify", ID)
        assert (said.code, named in said.err, "Traceback" in said.err) == (1, True, False), said.err
    hub.faults.clear()
    base = hub.repos.pop(("model", BASE_ID))
    said = tiny.fintune("verify", ID)
    assert said.code == 1 and f"knows no model {BASE_ID}" in said.err and "--base" in said.err
    hub.repos["model", BASE_ID] = base
    tiny.done("verify", ID)


def test_a_fetched_id_needs_no_hub(hub: Hub, stranger: Path) -> None:
    commit = hub.repos["model", ID].at("main").id
    tiny.done("verify", f"{ID}@{commit}")
    tiny.done("verify", ID)
    hub.stop()
    tiny.done("verify", f"{ID}@{commit}")
    said = tiny.done("verify", ID)
    assert "the hub does not answer: alice/adapter is the cached commit" in said.err


def test_what_is_ignored_is_never_read(tmp_path: Path) -> None:
    """Whatever it is: a device, a pickle, text that spells a local path."""
    folder = Path(shutil.copytree(built()[0], tmp_path / "copy"))
    (folder / ".gitattributes").symlink_to("/dev/zero")
    inside = folder / ".cache" / "huggingface" / "download"
    inside.mkdir(parents=True)
    (inside / "x.pkl").write_bytes(b"\x80\x04/home/someone/x")
    (inside / "y").symlink_to("/dev/zero")
    os.mkfifo(inside / "z")
    tiny.done("verify", folder, "--base", built()[1])


@pytest.mark.parametrize("name", [".gitignore", ".git", ".cached", "huggingface", ".env"])
def test_what_only_looks_like_it_is_refused(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(built()[0], tmp_path / "copy"))
    (folder / name).write_text("x")
    rewrite_sums(folder)
    refused(folder, f"not in the allow-list: {name}")
