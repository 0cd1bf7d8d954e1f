"""Bases that people bring: each prepared, a third of them trained a step, all of it in test-all.

`../shared/bases/build_bases.py` makes them: random weights in the true architecture, real tokenizer
and template. 23 need only ../shared; with BASES_NPM set (its head says how) there are 34.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

sys.path.append(str(tiny.ROOT / "bench"))
import bases

if not (tiny.SHARED / "bases").is_dir():
    pytest.skip(f"no bases at {tiny.SHARED}", allow_module_level=True)

EVERY = bool(os.environ.get("FINTUNE_TEST_ALL"))
TRAINED = {
    "deepseek-v3",
    "gpt-oss",
    "granite33",
    "lfm2",
    "llama4",
    "olmo3-instruct",
    "phi4",
    "qwen3",
}
"""Latent attention, sinks, scaled logits, convolutions, chunks, windows, fused names, q/k norms."""
SHARED_ONLY = 23


@pytest.fixture(scope="module")
def built() -> dict[str, Path]:
    """The bases that can be built here, by name; made once for all runs of the tests."""
    builder = bases.builder()
    script = (tiny.SHARED / "bases" / "build_bases.py").read_bytes()
    names = script + bases.version("transformers").encode()
    folder = tiny.ROOT / "runs" / f"bases-{hashlib.sha256(names).hexdigest()[:12]}"
    builder.OUT = folder
    for name in builder.B:
        if not (folder / name / "LICENSE").is_file():  # the last file of each
            try:
                builder.build(name)
            except FileNotFoundError:  # its tokenizer is in neither place
                continue
    bases.preload()
    made = {path.parent.name: path.parent for path in folder.glob("*/LICENSE")}
    assert len(made) >= SHARED_ONLY
    return made


def tried(built: dict[str, Path], name: str, work: Path, *stages: str) -> dict[str, Any]:
    """A row of the matrix in which every stage must have gone well."""
    if name not in built:
        pytest.skip("needs BASES_NPM")
    row = bases.try_base(built[name], work, stages)
    assert row["result"] == "works", json.dumps(row["stages"], indent=1)
    return row


@pytest.mark.parametrize("name", bases.builder().B)
def test_a_base_is_prepared(name: str, built: dict[str, Path], tmp_path: Path) -> None:
    """Every prompt is the tokenizer's own; what is trained are answers and their ends."""
    row = tried(built, name, tmp_path, "prepare", *["train"] * (name in TRAINED))
    if name not in TRAINED:
        return
    adapted, left = {*row["target_modules"]}, {*row["without_adapter"].values()}
    expected = {
        "deepseek-v3": ("kv_b_proj", {"experts", "router", "peft takes the name for an expert's"}),
        "gpt-oss": ("o_proj", {"experts", "router"}),
        "lfm2": ("self_attn.out_proj", {"convolution"}),
        "llama4": ("down_proj", {"experts", "router"}),
        "phi4": ("qkv_proj", set[str]()),
    }
    module, reasons = expected.get(name, ("gate_proj", set()))
    assert module in adapted and left == reasons


@pytest.mark.skipif(not EVERY, reason="half an hour: make test-all")
@pytest.mark.parametrize("name", bases.builder().B)
def test_a_base_works_whole(name: str, built: dict[str, Path], tmp_path: Path) -> None:
    tried(built, name, tmp_path, *bases.STAGES)


REFUSED = {
    "[q_proj,k_projj]": "k_projj fits no linear layer of the decoder",
    "[lm_head]": "lm_head fits no linear layer of the decoder",
    "[gate_up_proj]": "mlp.experts.gate_up_proj, mlp.experts.down_proj (experts)",
}
"""`train.lora.target_modules` -> what is said of it."""


def test_names_that_fit_nothing_are_refused_before_work(
    built: dict[str, Path], tmp_path: Path
) -> None:
    config = bases.write_config(built["gpt-oss"], tmp_path)
    tiny.done("prepare", "-c", config)
    for asked, says in REFUSED.items():
        said = tiny.fintune("train", "-c", config, "-s", f"train.lora.target_modules={asked}")
        assert said.code == 1 and "Traceback" not in said.err
        assert says in " ".join(said.err.split()) and not (tmp_path / "out" / "run").exists()


def test_what_is_known_of_bases_is_what_was_measured() -> None:
    known = tiny.answer_json("bases")
    measured = json.loads(bases.RESULTS.read_text())
    assert [row["id"] for row in known["bases"]] == [row["id"] for row in measured["bases"]]
    assert known["transformers"] == measured["versions"]["transformers"]
    assert sum(row["result"] == "works" for row in known["bases"]) == measured["works"] >= 32
    table = tiny.done("bases").out
    assert "meta-llama/Llama-3.1-8B-Instruct" in table and known["transformers"] in table
