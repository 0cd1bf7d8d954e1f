"""Files appear whole or not at all; seals tell finished folders from others."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fintune import seal
from fintune.errors import OutputError
from fintune.files import (
    cached_sha256,
    read_json,
    sha256_bytes,
    staged_folder,
    write_bytes,
    write_json,
)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nan_is_never_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_staged_folder_appears_whole_or_not(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(RuntimeError), staged_folder(final) as staging:
        (staging / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged_folder(final) as staging:
        (staging / "whole").write_text("whole")
        assert not final.exists()
    assert (final / "whole").read_text() == "whole"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask_but_those_of_what_is_published(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file", b"x")
        for published in (False, True):
            with staged_folder(tmp_path / f"{published}", published=published) as staging:
                write_bytes(staging / "file", b"x")
                save_file({"a": torch.zeros(1)}, staging / "weights")  # 0600 by itself
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    wanted = {"file": 0o666 & ~umask, "False": 0o777 & ~umask, "True": 0o755}
    assert modes == wanted
    for folder, mode in (("False", 0o666 & ~umask), ("True", 0o644)):
        inside = {path.stat().st_mode & 0o777 for path in (tmp_path / folder).iterdir()}
        assert inside == {mode}


def test_a_seal_tells_new_unfinished_finished_and_foreign(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    inputs = {"data": "a", "config": {"lr": 1}}
    assert seal.state(folder, inputs, command="x") is seal.State.NEW
    seal.start(folder, inputs)
    assert seal.state(folder, inputs, command="x") is seal.State.UNFINISHED
    (folder / "result").write_text("1")
    seal.seal(folder, inputs)
    assert seal.state(folder, inputs, command="x") is seal.State.FINISHED
    with pytest.raises(OutputError, match=r"config.lr: 1 -> 2"):
        seal.state(folder, {"data": "a", "config": {"lr": 2}}, command="x")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not of this stage") as caught:
        seal.state(foreign, inputs, command="x")
    assert "--fresh" not in str(caught.value)


def test_a_later_stage_reads_only_what_was_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with pytest.raises(OutputError, match="does not exist"):
        seal.read_seal(folder, stage="data", make="fintune prepare")
    seal.start(folder, {})
    with pytest.raises(OutputError, match="unfinished"):
        seal.read_seal(folder, stage="data", make="fintune prepare")
    (folder / "rows").write_text("12345")
    seal.seal(folder, {})
    assert "rows" in seal.read_seal(folder, stage="data", make="x")["files"]
    for changed in ("1", "12354"):
        (folder / "rows").write_text(changed)
        with pytest.raises(OutputError, match="rows was changed"):
            seal.read_seal(folder, stage="data", make="x")
    (folder / "rows").write_text("12345")
    for added in (".hidden", "checkpoints/1"):  # nobody reads these
        write_bytes(folder / added, b"")
    seal.read_seal(folder, stage="data", make="x")
    (folder / "regression.json").write_text("{}")
    with pytest.raises(OutputError, match="regression.json was not there"):
        seal.read_seal(folder, stage="data", make="x")


def test_a_part_of_a_result_is_never_taken_for_all_of_it(tmp_path: Path) -> None:
    for name in ("rows", "ledger"):
        write_bytes(tmp_path / name, b"12345")
    seal.seal(tmp_path, {})
    (tmp_path / "ledger").unlink()
    with pytest.raises(OutputError, match="ledger is missing"):
        seal.state(tmp_path, {}, command="x")


def test_the_hash_of_a_base_is_kept_for_the_same_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights, cache = tmp_path / "weights", tmp_path / "cache" / "fintune" / "sha256.json"
    write_bytes(weights, b"one")
    assert cached_sha256(weights) == sha256_bytes(b"one")
    ((key, digest),) = [row for row in read_json(cache).items() if row[0] != "format"]
    assert digest == sha256_bytes(b"one")
    write_json(cache, {key: "kept"})
    assert cached_sha256(weights) == "kept", "it is not read again"
    times = weights.stat()
    weights.write_bytes(b"two")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cached_sha256(weights) == sha256_bytes(b"two"), "size and mtime are the same"
    cache.write_text("[")
    assert cached_sha256(weights) == sha256_bytes(b"two")
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))  # no folder: nothing can be kept
    assert cached_sha256(weights) == sha256_bytes(b"two")


def test_moving_aside_deletes_nothing(tmp_path: Path) -> None:
    for content in ("first", "second"):
        seal.start(tmp_path / "run", {})
        write_json(tmp_path / "run" / "x.json", {"content": content})
        seal.move_aside(tmp_path / "run")
    kept = [read_json(tmp_path / f"run.old-{k}" / "x.json")["content"] for k in (1, 2)]
    assert kept == ["first", "second"]
