"""The hub for tests answers the real clients as the real one does, and each fault reaches them."""

import hashlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hub.server import Hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig

BASE = "acme/base"
CARD = b"---\nlicense: mit\ntags: [finance]\n---\n# Base\n"
WEIGHTS = random.Random(0).randbytes(300_000)
FILES = {"README.md": CARD, "config.json": b"{}", "sub/model.safetensors": WEIGHTS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model; the client of this process asks no other one, without Xet."""
    with Hub(tmp_path / "hub") as hub:
        hub.tokens |= {"hf_acme": ["alice", "acme"], "hf_bob": ["bob"]}
        hub.tokens["hf_read"] = ["alice", "acme", "read-only"]
        hub.commit("model", BASE, FILES, "first")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def api(hub: Hub, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def fetch(hub: Hub, name: str = "sub/model.safetensors", **changes: Any) -> Path:
    """Fetch a file of the model, by default the one that is stored as LFS, without a token."""
    asked: dict[str, Any] = {"endpoint": hub.url, "token": False, **changes}
    return Path(hf_hub_download(BASE, name, **asked))


def python(hub: Hub, home: Path, code: str, *, xet: bool = False) -> str:
    """What the code prints in a process that knows the hub by HF_ENDPOINT alone."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.env(home, "hf_acme", xet=xet),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_info_tells_commit_card_visibility_and_files(hub: Hub) -> None:
    info = api(hub).model_info(BASE, files_metadata=True)
    head = hub.repos["model", BASE].refs["refs/heads/main"]
    assert (info.sha, info.private, info.gated) == (head, False, False)
    assert info.card_data is not None and info.card_data.license == "mit"
    assert info.tags == ["finance", "license:mit"]
    files = {file.rfilename: file for file in info.siblings or []}
    assert files.keys() == FILES.keys()
    lfs = files["sub/model.safetensors"].lfs
    assert lfs and (lfs.sha256, lfs.size) == (hashlib.sha256(WEIGHTS).hexdigest(), 300_000)
    old = hub.commit("model", BASE, {"config.json": b"[]"}, "second")
    assert api(hub).model_info(BASE, revision=head).sha == head != old
    assert api(hub).model_info(BASE, expand=["gated"]).siblings is None


def test_a_commit_has_the_same_id_wherever_it_is_made(hub: Hub, tmp_path: Path) -> None:
    head = hub.repos["model", BASE].refs["refs/heads/main"]
    assert Hub(tmp_path / "other").commit("model", BASE, FILES, "first") == head
    assert Hub(tmp_path / "third").commit("model", BASE, FILES, "other") != head


def test_trees_come_in_pages_with_the_ids_of_git(hub: Hub) -> None:
    hub.page = 2
    rows = {row.path: row for row in api(hub).list_repo_tree(BASE, recursive=True)}
    assert [*rows] == ["README.md", "config.json", "sub", "sub/model.safetensors"]
    assert len(hub.requests("GET", "/tree/")) == 2
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert rows["config.json"].blob_id == blob  # type: ignore[union-attr]
    assert [row.path for row in api(hub).list_repo_tree(BASE, "sub")] == ["sub/model.safetensors"]
    with pytest.raises(EntryNotFoundError):
        list(api(hub).list_repo_tree(BASE, "missing"))


def test_refs_commits_and_paths(hub: Hub) -> None:
    first = hub.repos["model", BASE].refs["refs/heads/main"]
    hub.repos["model", BASE].refs["refs/tags/v1"] = first
    second = hub.commit("model", BASE, {"config.json": None}, "second")
    side = hub.commit("model", BASE, {"x.txt": b"x"}, branch="refs/pr/1")
    refs = api(hub).list_repo_refs(BASE)
    assert {b.name: b.target_commit for b in refs.branches} == {"main": second, "refs/pr/1": side}
    assert [(t.name, t.target_commit) for t in refs.tags] == [("v1", first)]
    hub.page = 1
    history = api(hub).list_repo_commits(BASE)
    assert [(c.commit_id, c.title) for c in history] == [(second, "second"), (first, "first")]
    found = api(hub).get_paths_info(BASE, ["README.md", "sub", "none"], revision="v1")
    assert [row.path for row in found] == ["README.md", "sub"]
    assert api(hub).model_info(BASE, revision="refs/pr/1").sha == side


def test_a_snapshot_is_of_the_commit_it_began_with(hub: Hub) -> None:
    first = hub.repos["model", BASE].refs["refs/heads/main"]

    def move() -> str:
        return hub.commit("model", BASE, {"config.json": b"[]"})

    hub.fault("GET", "/tree/", call=move)
    folder = Path(snapshot_download(BASE, endpoint=hub.url, token=False))
    assert (folder.name, (folder / "config.json").read_bytes()) == (first, b"{}")
    assert api(hub).model_info(BASE).sha != first
    tree = {row.path: row.blob_id for row in get_cached_repo_tree(BASE, revision=first)}
    assert tree["config.json"] == hub.repos["model", BASE].commits[first].files["config.json"].oid


@pytest.mark.parametrize("status", [401, 429, 503])
def test_the_client_takes_an_older_commit_from_its_cache_in_silence(hub: Hub, status: int) -> None:
    old = Path(snapshot_download(BASE, endpoint=hub.url, token=False))
    hub.commit("model", BASE, {"config.json": b"[]"})
    hub.fault("GET", "/api/models/", status=status)
    assert Path(snapshot_download(BASE, endpoint=hub.url, token=False)) == old


def test_storage_is_another_origin_and_gets_no_token(hub: Hub) -> None:
    assert fetch(hub, token="hf_acme").read_bytes() == WEIGHTS
    assert [r.status for r in hub.requests("HEAD", "/resolve/")] == [302]
    head, get = hub.log
    assert head.token == hashlib.sha256(b"hf_acme").hexdigest()[:8]
    assert (get.token, get.path[:5], get.sent, hub.sent) == (None, "/cdn/", 300_000, 300_000)


def test_missing_and_private_repositories(hub: Hub) -> None:
    hub.repos["model", BASE].private = True
    for name, token, status in (
        ("acme/none", False, 401),
        ("acme/none", "hf_bob", 404),
        (BASE, False, 401),
        (BASE, "hf_bob", 404),
    ):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api(hub, token).model_info(name)
        assert caught.value.response.status_code == status
    assert api(hub, "hf_read").model_info(BASE).private


def test_gated_repositories_tell_what_they_hold_and_give_it_to_the_accepted(hub: Hub) -> None:
    hub.repos["model", BASE].gated = "manual"
    assert api(hub).model_info(BASE).gated == "manual"
    for token, status in ((False, 401), ("hf_bob", 403)):
        with pytest.raises(GatedRepoError, match="restricted") as caught:
            fetch(hub, token=token)
        assert caught.value.response.status_code == status
    hub.repos["model", BASE].accepted.add("bob")
    assert fetch(hub, token="hf_bob").is_file()


def test_wrong_revisions_and_files(hub: Hub) -> None:
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info(BASE, revision="v9")
    with pytest.raises(RevisionNotFoundError):
        fetch(hub, revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        fetch(hub, "none.txt")
    assert try_to_load_from_cache(BASE, "none.txt") is not None  # the absence is cached


def test_tokens(hub: Hub) -> None:
    who = api(hub, "hf_read").whoami()
    assert (who["name"], who["orgs"][0]["name"]) == ("alice", "acme")
    assert who["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api(hub, "hf_old").whoami()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        api(hub, "hf_old").model_info(BASE)
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


@pytest.mark.parametrize(("block", "start"), [(constants.DOWNLOAD_CHUNK_SIZE, 0), (40_000, 80_000)])
def test_a_body_that_is_cut_is_resumed_behind_its_last_whole_block(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, block: int, start: int
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", block)
    hub.fault("GET", "/cdn/", cut=100_000)
    assert fetch(hub).read_bytes() == WEIGHTS
    first, second = hub.requests("GET", "/cdn/")
    assert (first.sent, second.sent) == (100_000, 300_000 - start)
    assert (second.range, second.status) == ((f"bytes={start}-", 206) if start else (None, 200))


def test_a_flipped_bit_is_not_seen_over_plain_http(hub: Hub) -> None:
    hub.fault("GET", "/cdn/", flip=7)
    found = fetch(hub).read_bytes()
    assert (found[7], found[:7] + found[8:]) == (WEIGHTS[7] ^ 1, WEIGHTS[:7] + WEIGHTS[8:])


def test_429_is_waited_for_by_downloads_and_not_by_info(hub: Hub) -> None:
    wait = {"Retry-After": "0"}
    hub.fault("GET", f"/api/models/{BASE}$", status=429, headers=wait)
    with pytest.raises(HfHubHTTPError, match="429"):
        api(hub).model_info(BASE)
    hub.fault("GET", "/tree/", status=429, headers=wait)
    hub.fault("GET", "/cdn/", status=429, headers=wait)
    snapshot_download(BASE, endpoint=hub.url, token=False)
    assert [r.status for r in hub.requests("GET", "/tree/|/cdn/")] == [429, 200, 429, 200]


def test_503_is_waited_for_by_head_and_not_by_the_file(hub: Hub) -> None:
    hub.fault("HEAD", status=503)
    fetch(hub)
    assert [r.status for r in hub.requests("HEAD")] == [503, 302]
    hub.fault("GET", "/cdn/", status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        fetch(hub, force_download=True)
    hub.fault("HEAD", status=503)
    assert fetch(hub).is_file()  # a cached file is taken at once
    assert len(hub.requests("HEAD")) == 4


def test_a_late_answer_runs_into_the_timeout(hub: Hub) -> None:
    rule = hub.fault("HEAD", delay=0.5)
    assert fetch(hub, etag_timeout=0.1).read_bytes() == WEIGHTS
    assert (rule.times, len(hub.requests("HEAD"))) == (0, 2)


def test_a_connection_closed_without_an_answer_is_no_os_error(hub: Hub) -> None:
    hub.fault("GET", "/api/models", close=True)
    with pytest.raises(httpx2.RemoteProtocolError) as caught:
        api(hub).model_info(BASE)
    assert not isinstance(caught.value, OSError)
    assert [r.status for r in hub.log] == [0]


def test_a_slow_stream_comes_whole(hub: Hub) -> None:
    hub.fault("GET", "/cdn/", rate=600_000)
    began = time.monotonic()
    assert fetch(hub).read_bytes() == WEIGHTS
    assert time.monotonic() - began > 0.4


def test_a_hub_that_is_gone_is_no_os_error_and_comes_back_on_its_port(
    hub: Hub, tmp_path: Path
) -> None:
    code = (
        "import httpx2, huggingface_hub as h\n"
        f"try: h.model_info('{BASE}')\n"
        "except httpx2.ConnectError as error: print(isinstance(error, OSError))"
    )
    url = hub.url
    hub.stop()
    assert python(hub, tmp_path / "home", code) == "False"
    with hub:
        assert hub.url == url and api(hub).model_info(BASE).id == BASE


def test_only_loopback_is_bound(hub: Hub) -> None:
    assert {server.socket.getsockname()[0] for server in hub.servers} == {"127.0.0.1"}


def test_rules_skip_count_and_run_out(hub: Hub) -> None:
    hub.fault("GET", "/api/", skip=1, times=2, status=500, body=b'{"error": "down"}')
    seen = []
    for _ in range(4):
        try:
            seen.append(api(hub).model_info(BASE).id)
        except HfHubHTTPError as error:
            seen.append(error.server_message or "")
    assert seen == [BASE, "down", "down", BASE]


def test_a_claimed_size_is_told_before_a_byte_is_sent(hub: Hub) -> None:
    hub.repos["model", BASE].at("main").files["sub/model.safetensors"].size = 10**15
    plan = snapshot_download(BASE, endpoint=hub.url, token=False, dry_run=True)
    assert max(file.file_size or 0 for file in plan) == 10**15
    assert not hub.requests("GET", "/cdn/|/resolve/")


def test_repositories_are_created_once_where_the_token_may(hub: Hub) -> None:
    mine = api(hub, "hf_acme")
    assert mine.create_repo("acme/new", private=True).repo_id == "acme/new"
    assert mine.create_repo("acme/new", private=False, exist_ok=True).repo_id == "acme/new"
    assert hub.repos["model", "acme/new"].private  # exist_ok changes nothing
    assert mine.create_repo("own").repo_id == "alice/own"
    assert mine.create_repo("acme/new", repo_type="dataset").repo_type == "dataset"
    with pytest.raises(HfHubHTTPError, match="already created"):
        mine.create_repo("acme/new")
    for token, name in (("hf_acme", "bob/x"), ("hf_read", "acme/x")):
        with pytest.raises(HfHubHTTPError, match="403"):
            api(hub, token).create_repo(name)
    mine.update_repo_settings("acme/new", private=False, gated="auto")
    repo = hub.repos["model", "acme/new"]
    assert (repo.private, repo.gated) == (False, "auto")
    mine.delete_repo("acme/new")
    assert ("model", "acme/new") not in hub.repos


def push(hub: Hub, files: dict[str, bytes | None], parent: str | None = None) -> str:
    """One commit to the base's main; None deletes."""
    operations = [
        CommitOperationDelete(name) if data is None else CommitOperationAdd(name, data)
        for name, data in files.items()
    ]
    writer = api(hub, "hf_acme")
    message = "push"
    return writer.create_commit(BASE, operations, commit_message=message, parent_commit=parent).oid


def test_a_push_is_one_commit_of_regular_files_lfs_and_deletions(hub: Hub) -> None:
    first = hub.repos["model", BASE].refs["refs/heads/main"]
    new = {"a.safetensors": WEIGHTS[::-1], "b.txt": b"b", "config.json": None, "sub/": None}
    made = push(hub, new, first)
    commit = hub.repos["model", BASE].at("main")
    assert (commit.id, commit.parent, commit.message) == (made, first, "push")
    assert {*commit.files} == {"README.md", "a.safetensors", "b.txt"}
    assert commit.files["a.safetensors"].path.read_bytes() == WEIGHTS[::-1]
    assert push(hub, {"a.safetensors": WEIGHTS[::-1], "b.txt": b"b"}) == made  # nothing to do
    assert len(hub.requests("PUT", "/lfs/")) == 1
    with pytest.raises(HfHubHTTPError, match="write access"):
        api(hub, "hf_read").upload_file(path_or_fileobj=b"", path_in_repo="c", repo_id=BASE)


def test_a_push_on_a_main_that_moved_is_refused_whole(hub: Hub) -> None:
    first = hub.repos["model", BASE].refs["refs/heads/main"]
    hub.fault("POST", "/commit/", call=lambda: hub.commit("model", BASE, {"x": b"x"}, "theirs"))
    with pytest.raises(HfHubHTTPError, match="412"):
        push(hub, {"b.txt": b"b"}, first)
    assert hub.repos["model", BASE].at("main").message == "theirs"


def test_a_lost_answer_leaves_the_commit(hub: Hub) -> None:
    hub.fault("POST", "/commit/", lose=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        push(hub, {"b.txt": b"b"})
    assert "b.txt" in hub.repos["model", BASE].at("main").files


@pytest.mark.parametrize("status", [413, 507])
def test_storage_that_refuses_is_a_runtime_error(hub: Hub, status: int) -> None:
    hub.fault("PUT", "/lfs/", status=status)
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        push(hub, {"a.bin": WEIGHTS[1:]})
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    assert hub.repos["model", BASE].at("main").message == "first"


def test_uploads_are_held_against_their_hash(hub: Hub) -> None:
    assert httpx2.put(f"{hub.storage}/lfs/{'0' * 64}", content=b"x").status_code == 400
    chunks = iter([b"a", b"b"])  # without a length: chunked
    oid = hashlib.sha256(b"ab").hexdigest()
    assert httpx2.put(f"{hub.storage}/lfs/{oid}", content=chunks).status_code == 200
    assert oid in hub.lfs
    with socket.create_connection(("127.0.0.1", hub.ports[1])) as client:  # killed half way
        client.sendall(f"PUT /lfs/{oid} HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf".encode())
    assert httpx2.get(f"{hub.url}/api/models/{BASE}").status_code == 200
    assert [r.status for r in hub.requests("PUT")] == [400, 200, 0]


def test_a_card_that_is_no_yaml_is_refused_before_anything_is_sent(hub: Hub) -> None:
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        push(hub, {"README.md": b"---\na: [\n---\n", "a.bin": WEIGHTS[1:]})
    assert not hub.requests("PUT|POST", "/lfs/|/preupload/")


def test_xet_goes_both_ways_and_can_be_read_without(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    data = WEIGHTS[:200_000] + bytes(100_000) + b"abc" * 200_000
    push(hub, {"a.safetensors": data})
    assert [r.status for r in hub.requests("POST", "/v1/xorbs|/v1/shards")] == [200, 200]
    assert not hub.requests("PUT")
    assert fetch(hub, "a.safetensors").read_bytes() == data and hub.requests("GET", "/v1/xorbs")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert fetch(hub, "a.safetensors", cache_dir=tmp_path / "plain").read_bytes() == data
    assert len(hub.requests("GET", "/cdn/")) == 1


def test_xet_resumes_what_is_cut_and_does_not_see_a_flipped_bit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push(hub, {"a.safetensors": WEIGHTS[::-1]})
    hub.fault("GET", "/v1/xorbs/", cut=50_000)
    whole = fetch(hub, "a.safetensors", cache_dir=tmp_path / "whole").read_bytes()
    assert whole == WEIGHTS[::-1] and len(hub.requests("GET", "/v1/xorbs/")) == 2
    hub.fault("GET", "/v1/xorbs/", flip=5_000)
    damaged = fetch(hub, "a.safetensors", cache_dir=tmp_path / "damaged").read_bytes()
    assert [a ^ b for a, b in zip(damaged, whole, strict=True) if a != b] == [1]


def test_xet_that_is_refused_is_no_hub_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fault("GET", "/xet-write-token/", status=403, times=-1)
    with pytest.raises(ConnectionError, match="403 Forbidden") as caught:
        push(hub, {"a.safetensors": WEIGHTS})
    assert not isinstance(caught.value, HfHubHTTPError)


def test_transformers_reads_it(hub: Hub, tmp_path: Path) -> None:
    config = b'{"model_type": "llama", "hidden_size": 64}'
    made = hub.commit("model", BASE, {"config.json": config})
    found = AutoConfig.from_pretrained(BASE, cache_dir=tmp_path, token=False)
    assert found.hidden_size == 64
    assert (tmp_path / "models--acme--base" / "snapshots" / made / "config.json").is_file()


def test_processes_find_it_by_hf_endpoint(hub: Hub, tmp_path: Path) -> None:
    hub.commit("dataset", "acme/rows", {"train.jsonl": b'{"a": 1}'})
    hub.repos["dataset", "acme/rows"].private = True
    code = (
        "import huggingface_hub as h\n"
        "h.dataset_info('acme/rows')\n"
        "print(open(h.hf_hub_download('acme/rows', 'train.jsonl', repo_type='dataset')).read())"
    )
    assert python(hub, tmp_path / "home", code) == '{"a": 1}'
    asked = hub.requests("", "/api/datasets/acme/rows$")
    assert asked and asked[0].token == hashlib.sha256(b"hf_acme").hexdigest()[:8]


def test_the_program_serves_folders(tmp_path: Path) -> None:
    for name, text in (("base@v1", "old"), ("base", "new")):
        (tmp_path / "models" / "acme" / name).mkdir(parents=True)
        (tmp_path / "models" / "acme" / name / "a.txt").write_text(text)
    program = Path(__file__).parent / "hub" / "server.py"
    command = [sys.executable, str(program), str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        texts = [httpx2.get(f"{url}/{BASE}/resolve/{r}/a.txt").text for r in ("v1", "main")]
        process.kill()
    assert texts == ["old", "new"]
