"""What a release contains, when it is refused, and that the seed's usage snippet runs on it."""

import contextlib
import io
import json
import os
import pickletools
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fintune.releasing.card import vllm_rank
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_release import tiny_base, tiny_run

from fintune import files, seal
from fintune.config import Config
from fintune.errors import GateRefused, OutputError
from fintune.releasing.bundle import release
from fintune.releasing.verify import verify


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny_run(tmp_path_factory.mktemp("run"), base, training_args_bin=True)
    release(config)
    return config


def test_release_holds_every_file_of_the_list(config: Config) -> None:
    names = {path.name for path in config.release_dir.iterdir()}
    assert names == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
        "training_config.json", "training_args.bin", "test_results.json",
        "eval_50_gpt_judged_raw.jsonl", "prompt_fixture.json", "README.md", "SHA256SUMS",
    }  # fmt: skip
    modes = {stat.S_IMODE(path.stat().st_mode) for path in config.release_dir.iterdir()}
    assert modes == {0o644}


def test_release_names_its_base_and_no_path(config: Config, base: Path) -> None:
    tree = json.loads((config.release_dir / "adapter_config.json").read_text())
    assert tree["base_model_name_or_path"] == "fintune/tiny"
    assert tree["revision"] is None, "peft would ask the hub for it, and no commit is known"
    kept = json.loads((config.release_dir / "training_config.json").read_text())["provenance"]
    assert kept["base_sha256"] == files.sha256_file(base / "model.safetensors")
    for path in config.release_dir.iterdir():
        for private in (str(config.out), str(base), os.uname().nodename):
            assert private.encode() not in path.read_bytes(), path.name


def test_training_args_bin_is_fresh_and_only_where_asked(
    config: Config, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its opcodes are listed, never run: settings of the run alone, no secret, no machine."""
    with zipfile.ZipFile(config.release_dir / "training_args.bin") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        opcodes = list(pickletools.genops(archive.read(name)))
    words = [value for _, value, _ in opcodes if isinstance(value, str)]
    modules = {word.split(".")[0].split(" ")[0] for op, word, _ in opcodes if op.name == "GLOBAL"}
    assert modules <= {"transformers", "torch", "accelerate", "builtins", "collections"}
    assert "learning_rate" in words and "hub_token" in words
    assert not [word for word in words if word.startswith(("/", "hf_")) or "runs/" in word]
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret_of_this_test")
    plain = tiny_run(tmp_path / "run", base)
    names = {path.name for path in release(plain).iterdir()}
    assert "training_args.bin" not in names
    for path in plain.release_dir.iterdir():
        assert b"hf_planted" not in path.read_bytes(), path.name


def test_card_says_what_was_measured_and_nothing_else(config: Config, base: Path) -> None:
    card = ModelCard.load(config.release_dir / "README.md")
    assert card.data.base_model == "fintune/tiny" and card.data.library_name == "peft"
    assert card.data.license is None, "not known, so not stated"
    for text in (
        "Verdict: **better**.",
        "| accuracy | 50.0 % | 75.0 % |",
        "25.0 % (18.0 % to 32.0 %), over 240 paired questions",
        "80 % power is 7.0 %",
        "3 unscored (no_judge)",
        "| rows.jsonl | sha256:abc | Apache-2.0 | 10 | 5 |",
        "| dropped: too_short | 2 |",
        "| seconds of training | 61.5 |",
        "--max-lora-rank 8 ",
        "this reason: too high (config.train.learning_rate: 0.1 -> 0.01).",
        "at update 7: since then micro-batches of at most 1,024 tokens",
        "not financial advice",
    ):
        assert text in card.text, text
    assert "energy" not in card.text and "CPU cores" not in card.text
    seed, chat = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    seed = seed.replace('"fintune/tiny"', f'"{base}"').replace('"tiny"', f'"{config.release_dir}"')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(seed.replace("max_new_tokens=256", "max_new_tokens=4") + chat, {})
    fixture = json.loads((config.release_dir / "prompt_fixture.json").read_text())
    assert f'date_string="{fixture["date_string"]}"' in chat
    assert "Explain what a yield curve inversion implies for equities." in printed.getvalue()


def test_card_names_the_judge(base: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", base)
    scored = {"status": "scored", "model": "judge-1", "served_model": "judge-1-2026-01-01"}
    rows = [scored, scored, {**scored, "served_model": None}, {"status": "unscored"}]
    files.write_jsonl(config.eval_dir / "eval_50_gpt_judged_raw.jsonl", rows)
    seal.seal(config.eval_dir, json.loads((config.eval_dir / "done.json").read_text())["inputs"])
    said = (release(config) / "README.md").read_text()
    assert "2 verdicts of judge-1-2026-01-01" in said and "1 verdicts of judge-1;" in said
    assert "verdicts of None" not in said


def test_special_tokens_map_agrees_with_the_tokenizer(config: Config) -> None:
    tree = json.loads((config.release_dir / "special_tokens_map.json").read_text())
    assert tree == {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }


def test_seed_snippet_runs_letter_for_letter(config: Config, base: Path) -> None:
    """The published recipe's own lines; the test above runs those of the card."""
    published = Path(__file__).parents[2] / "shared" / "seed-model-card.md"
    if not published.is_file():
        pytest.skip("no ../shared/seed-model-card.md")
    blocks = [
        re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)[0]
        for path in (config.release_dir / "README.md", published)
    ]
    names = [re.findall(r'^(?:base|adapter) = "(.*)"$', block, flags=re.M) for block in blocks]
    assert names == [
        ["fintune/tiny", "tiny"],
        ["meta-llama/Meta-Llama-3.1-8B-Instruct", "TimberGu/Llama_for_Finance"],
    ]
    for theirs, ours in zip(names[1], names[0], strict=True):
        blocks[1] = blocks[1].replace(f'"{theirs}"', f'"{ours}"')
    assert blocks[0] == blocks[1]


def test_text_of_others_reaches_the_card_without_control_characters(
    base: Path, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path / "run", base, verdict="worse")
    card = (release(config, accept="a \x1b[31mred\u202e reason") / "README.md").read_text()
    assert "a \\x1b[31mred\\u202e reason" in card


def test_verify_accepts_our_own_release(config: Config, base: Path) -> None:
    report = verify(config.release_dir, base=base)
    passed = {check.name for check in report.checks if check.status == "ok"}
    assert passed >= {
        "files", "checksums", "code hooks", "template", "weights", "paths", "base", "keys", "load",
        "tokenizer", "fixture", "answers",
    }  # fmt: skip
    assert "training_args.bin is a pickle and never opened" in report.checks[0].detail
    with pytest.raises(GateRefused, match="--no-pickle"):
        verify(config.release_dir, base=base, no_pickle=True).settle()


def test_same_release_again_is_kept_and_another_refused(config: Config) -> None:
    before = (config.release_dir / "SHA256SUMS").stat().st_mtime_ns
    assert release(config) == config.release_dir
    assert (config.release_dir / "SHA256SUMS").stat().st_mtime_ns == before
    other = config.model_copy(
        update={"release": config.release.model_copy(update={"license": "mit"})}
    )
    with pytest.raises(OutputError, match="release.license"):
        release(other)


def test_gate_refuses_and_accepts_by_named_reason(base: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", base, verdict="no_detectable_difference")
    with pytest.raises(GateRefused, match="no_detectable_difference"):
        release(config)
    assert not config.release_dir.exists()
    with pytest.raises(GateRefused, match="needs a reason"):
        release(config, accept=" ")
    release(config, accept="a smoke test of the pipeline")
    with pytest.raises(GateRefused, match="no_detectable_difference"):
        release(config, fresh=True)  # refused before the old one is moved
    assert config.release_dir.is_dir()
    assert "a smoke test of the pipeline" in (config.release_dir / "README.md").read_text()


def test_gate_refuses_what_does_not_belong_together(base: Path, tmp_path: Path) -> None:
    """A local path, another adapter, leaked rows, missing files: each named, nothing built."""
    config = tiny_run(tmp_path / "run", base)
    judged = config.eval_dir / "eval_50_gpt_judged_raw.jsonl"
    seals = json.loads((config.eval_dir / "done.json").read_text())["inputs"]
    whole = judged.read_text()
    judged.write_text(whole.replace('"k"', '"/home/x/y"'))
    seal.seal(config.eval_dir, seals)
    with pytest.raises(GateRefused, match=r"paths: .*eval_50_gpt_judged_raw.jsonl"):
        release(config)
    judged.write_text(whole)
    seal.seal(config.eval_dir, seals | {"adapter": "0" * 64})
    with pytest.raises(GateRefused, match="evaluation is of another adapter"):
        release(config, accept="a verdict can be accepted, this cannot")
    seal.seal(config.eval_dir, seals)
    weights = config.run_dir / "best" / "adapter_model.safetensors"
    good, tensors = weights.read_bytes(), load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    run = json.loads((config.run_dir / "done.json").read_text())["inputs"]
    with pytest.raises(OutputError, match="adapter_model.safetensors was changed"):
        release(config)
    seal.seal(config.run_dir, run)
    with pytest.raises(GateRefused, match="NaN or infinite"):
        release(config)
    weights.write_bytes(good)
    seal.seal(config.run_dir, run)
    pq.write_table(pa.table({"group": ["e"]}), config.data_dir / "test.parquet")
    seal.seal(config.data_dir, {})
    with pytest.raises(GateRefused, match="decided by other rows"):
        release(config)
    seals["test"] = files.sha256_file(config.data_dir / "test.parquet")
    results = json.loads((config.eval_dir / "test_results.json").read_text())
    files.write_json(config.eval_dir / "test_results.json", results | {"n": {"contaminated": 1}})
    seal.seal(config.eval_dir, seals)
    with pytest.raises(GateRefused, match="found contaminated test rows"):
        release(config)
    (config.run_dir / "done.json").unlink()
    with pytest.raises(OutputError, match="fintune train"):
        release(config)
    assert not config.release_dir.exists()
    assert sorted(path.name for path in config.out.iterdir()) == [
        ".release.lock", "data", "eval", "run"
    ]  # fmt: skip


def test_llama_base_brings_its_licence(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    config = tiny_run(tmp_path / "run", folder)
    llama = config.model.model_copy(update={"id": "meta-llama/Meta-Llama-3.1-8B-Instruct"})
    config = config.model_copy(update={"model": llama})
    with pytest.raises(GateRefused, match="no licence text"):
        release(config)
    (folder / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n")
    made = release(config)
    card = (made / "README.md").read_text()
    assert "# Llama tiny" in card and "**Built with Llama.**" in card
    assert "license: llama3.1" in card
    assert (made / "LICENSE").read_text() == (folder / "LICENSE").read_text()
    assert "Llama 3.1 is licensed under" in (made / "NOTICE").read_text()


def test_two_builds_have_the_same_bytes(config: Config, tmp_path: Path) -> None:
    """Another umask, timezone, hash seed, user, locale and working folder: the same SHA256SUMS."""
    script = (
        "import os,sys; os.umask(0o077)\n"
        "from pathlib import Path; from fintune.config import load_config\n"
        "from fintune.releasing.bundle import release\n"
        "release(load_config(sys.argv[1], ['release.out=' + sys.argv[2]]))\n"
    )
    out = tmp_path / "again"
    other = {"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    other |= {"USER": "other", "LOGNAME": "other", "HOME": str(tmp_path)}
    other["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", script, str(config.run_dir / "config.yaml"), str(out)]
    subprocess.run(command, env=os.environ | other, cwd=tmp_path, check=True)
    for path in sorted(config.release_dir.iterdir(), key=lambda path: path.name == "SHA256SUMS"):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_vllm_rank_is_the_next_allowed() -> None:
    assert [vllm_rank(rank) for rank in (4, 8, 16, 17, 64, 65)] == [8, 8, 16, 32, 64, 128]
