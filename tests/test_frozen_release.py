"""Frozen: what a release holds, what verify accepts and refuses, and every form it exports."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import frozen
import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def verify(folder: Path, *words: object) -> tiny.Said:
    """`fintune verify` of a folder with its base."""
    return tiny.fintune("verify", folder, "--base", tiny.base(), *words)


def export(form: str, folder: Path, *words: object) -> tiny.Said:
    """`fintune export` of a folder with its base."""
    return tiny.fintune("export", form, folder, "--base", tiny.base(), *words)


@pytest.fixture(scope="module")
def tuned(chain: tiny.Chain) -> Any:
    """The release on its base, loaded as peft's own users load it."""
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny.base()), chain.release
    ).eval()


@pytest.fixture
def release(chain: tiny.Chain, tmp_path: Path) -> Path:
    """A copy of the release to break."""
    return shutil.copytree(chain.release, tmp_path / "release")


def greedy(model: Any, ids: list[int], tokens: int = 12) -> list[int]:
    """Greedy continuation by transformers' own generate."""
    with torch.inference_mode():
        made = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=tokens, pad_token_id=511
        )
    return [int(token) for token in made[0, len(ids) :]]


def prompts(release: Path) -> list[list[int]]:
    """Ids of the fixture's prompts."""
    fixture = frozen.read_json(release / "prompt_fixture.json")
    return [list(row["prompt_ids"]) for row in fixture["conversations"]]


def rewrite_sums(release: Path) -> None:
    """SHA256SUMS of the folder as it is now."""
    names = sorted(p.name for p in release.iterdir() if p.name != "SHA256SUMS")
    lines = [f"{tiny.file_sha256(release / name)}  {name}\n" for name in names]
    (release / "SHA256SUMS").write_text("".join(lines))


# ---- the release -----------------------------------------------------------------------------


def test_the_release_is_the_frozen_one(chain: tiny.Chain) -> None:
    assert frozen.of_release(chain.release) == frozen.frozen()["release"]


def test_sha256sum_verifies_it(chain: tiny.Chain) -> None:
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    checked = subprocess.run(command, cwd=chain.release, capture_output=True, text=True, check=True)
    listed = {line.partition(":")[0] for line in checked.stdout.splitlines()}
    assert listed == {path.name for path in chain.release.iterdir()} - {"SHA256SUMS"}


def test_its_parts_are_those_of_the_run_and_the_evaluation(chain: tiny.Chain) -> None:
    for folder, name in (
        (chain.run / "best", "adapter_model.safetensors"),
        (chain.eval, "test_results.json"),
        (chain.eval, "eval_50_gpt_judged_raw.jsonl"),
        (tiny.base(), "chat_template.jinja"),
    ):
        assert (chain.release / name).read_bytes() == (folder / name).read_bytes()
    facts = frozen.read_json(chain.release / "training_config.json")["provenance"]
    assert facts["adapter_sha256"] == tiny.file_sha256(chain.release / "adapter_model.safetensors")
    assert facts["accepted"] is None


def test_the_card_says_what_was_measured(chain: tiny.Chain) -> None:
    card = (chain.release / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["base_model"] == tiny.BASE_ID
    assert facts["library_name"] == "peft"
    assert "28.3" in text
    assert "better" in text


def test_no_file_names_a_folder_of_this_machine(chain: tiny.Chain) -> None:
    private = [str(folder).encode() for folder in (chain.out, tiny.ROOT, tiny.base())]
    for path in chain.release.iterdir():
        assert not [text for text in private if text in path.read_bytes()], path.name


def test_two_builds_have_the_same_bytes(chain: tiny.Chain, tmp_path: Path) -> None:
    again = tmp_path / "again"
    tiny.done("release", *chain.words(), *tiny.words(release_out=again))
    assert tiny.tree_sha256(again) == tiny.tree_sha256(chain.release)
    before = {path: path.stat().st_mtime_ns for path in again.iterdir()}
    said = tiny.done("release", *chain.words(), *tiny.words(release_out=again))
    assert "released already, unchanged" in said.err
    assert {path: path.stat().st_mtime_ns for path in again.iterdir()} == before


def test_the_fixture_is_what_transformers_makes(chain: tiny.Chain, tuned: Any) -> None:
    fixture = frozen.read_json(chain.release / "prompt_fixture.json")
    tokenizer = AutoTokenizer.from_pretrained(chain.release)
    for row in fixture["conversations"]:
        dated = {"tokenize": False, "date_string": fixture["date_string"]}
        text = tokenizer.apply_chat_template(row["messages"], **dated)
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, **dated
        )
        assert (row["text"], row["prompt"]) == (text, prompt)
        if row["name"] != "control":  # its text spells control tokens, which stay text here
            assert tokenizer.encode(text, add_special_tokens=False) == row["input_ids"]
        assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
        assert greedy(tuned, row["prompt_ids"], 24) == row["answer"]["ids"]


def test_an_adapter_not_shown_to_be_better_needs_a_reason(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path / "few", "data", "run")
    words = tiny.chain(copy.out)
    tiny.done("eval", *words)
    results = frozen.read_json(copy.eval / "test_results.json")
    assert results["verdict"] == "invalid"
    assert results["invalid_reasons"][0].startswith("3 checkable items (fewer than 100)")
    refused = tiny.fintune("release", *words)
    assert (refused.code, "the verdict is 'invalid'" in refused.err) == (3, True), refused.err
    assert not copy.release.exists()
    assert tiny.fintune("release", *words, "--accept", "  ").code == 3
    tiny.done("release", *words, "--accept", "only a rehearsal")
    assert "only a rehearsal" in (copy.release / "README.md").read_text(encoding="utf-8")
    assert verify(copy.release).code == 0


def test_results_of_another_adapter_are_refused(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path / "other", "data", "eval")
    tiny.done("train", *copy.words(max_steps=2))
    said = tiny.fintune("release", *copy.words(max_steps=2))
    assert said.code == 3
    assert "the evaluation is of another adapter" in said.err


def test_training_arguments_are_added_where_asked(chain: tiny.Chain, tmp_path: Path) -> None:
    folder = tmp_path / "with"
    asked = tiny.words(release_out=folder, training_args_bin=True)
    tiny.done("release", *chain.words(), *asked)
    names = {path.name for path in folder.iterdir()}
    assert names - {path.name for path in chain.release.iterdir()} == {"training_args.bin"}
    assert verify(folder).code == 0
    refused = verify(folder, "--no-pickle")
    assert (refused.code, "training_args.bin is a pickle" in refused.err) == (3, True)


# ---- verify ----------------------------------------------------------------------------------


def test_verify_accepts_it_and_names_its_checks(chain: tiny.Chain) -> None:
    checks = json.loads(verify(chain.release, "--json").out)
    assert {check["status"] for check in checks} == {"ok"}
    names = ["files", "checksums", "code hooks", "template", "weights", "paths"]
    names += ["base", "keys", "load", "tokenizer", "fixture", "answers"]
    assert [check["name"] for check in checks] == names


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "README.md", "tokenizer.json", "adapter_config.json"],
)
def test_one_bit_is_refused(release: Path, name: str) -> None:
    data = bytearray((release / name).read_bytes())
    data[-40] ^= 1
    (release / name).write_bytes(data)
    said = verify(release)
    assert (said.code, f"changed: {name}" in said.err) == (3, True), said.err


def test_one_bit_under_rewritten_checksums_is_refused_by_the_answers(release: Path) -> None:
    path = release / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40  # the highest bit of an exponent: a weight of 1e-2 becomes 1e36
    path.write_bytes(data)
    rewrite_sums(release)
    said = verify(release)
    assert (said.code, "answers: " in said.err) == (3, True), said.err


def broken(release: Path, what: str) -> None:
    """Break a release in one way, its checksums rewritten after it."""
    config = frozen.read_json(release / "adapter_config.json")
    if what == "a pickle":
        (release / "model.bin").write_bytes(b"x")
    elif what == "a file that is not known":
        (release / "setup.py").write_text("")
    elif what == "no weights":
        (release / "adapter_model.safetensors").unlink()
    elif what == "another revision":
        config["revision"] = "0" * 64
    elif what == "code":
        config["auto_mapping"] = {"base_model_class": "Evil"}
    elif what == "a local base":
        config["base_model_name_or_path"] = "/home/someone/base"
    elif what == "another template":
        path = release / "chat_template.jinja"
        path.write_text(path.read_text().replace("Today Date", "Date"))
    elif what == "a template that reaches out":
        (release / "chat_template.jinja").write_text("{{ ''.__class__ }}")
    (release / "adapter_config.json").write_text(json.dumps(config))
    rewrite_sums(release)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a pickle", "pickle: reading it can run code: model.bin"),
        ("a file that is not known", "not in the allow-list: setup.py"),
        ("no weights", "missing: adapter_model.safetensors"),
        ("another revision", "trained on another base"),
        ("code", "asks to import code"),
        ("a local base", "no public model id"),
        ("another template", "the chat template is not the one it was trained with"),
        ("a template that reaches out", "template: reaches for __class__"),
    ],
)
def test_a_broken_release_is_refused_by_name(release: Path, what: str, said: str) -> None:
    broken(release, what)
    found = verify(release)
    assert (found.code, said in found.err) == (3, True), found.err


def test_what_is_not_there_ends_with_1(chain: tiny.Chain, tmp_path: Path) -> None:
    assert tiny.fintune("verify", tmp_path / "nothing").code == 1
    said = tiny.fintune("verify", chain.release)
    assert (said.code, "test/tiny is not on this machine" in said.err) == (1, True)


# ---- exports ---------------------------------------------------------------------------------


def test_merged_answers_as_the_adapter(chain: tiny.Chain, tuned: Any, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = export("merged", chain.release, "--out", out, "--dtype", "fp32")
    assert said.code == 0, said.err
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    assert merged.dtype == torch.float32
    assert not list(out.glob("adapter*"))
    for ids in prompts(chain.release):
        assert greedy(merged, ids) == greedy(tuned, ids)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_chat_template() == (tiny.base() / "chat_template.jinja").read_text()
    again = export("merged", chain.release, "--out", out)
    assert (again.code, f"{out} exists" in again.err) == (1, True)


def test_merged_is_bf16_where_nothing_is_said(chain: tiny.Chain, tmp_path: Path) -> None:
    said = export("merged", chain.release, "--out", tmp_path / "merged")
    assert said.code == 0, said.err
    config = frozen.read_json(tmp_path / "merged" / "config.json")
    assert config["dtype"] == "bfloat16"


def read_gguf(path: Path) -> Any:
    """A GGUF file as the gguf package reads it."""
    return pytest.importorskip("gguf").GGUFReader(path)


def text_of(reader: Any, name: str) -> str:
    """A text of a GGUF file's head."""
    return str(reader.get_field(name).contents())


def test_gguf_of_the_adapter_is_read_back(chain: tiny.Chain, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    said = export("gguf", chain.release, "--out", out, "--dtype", "f32")
    assert said.code == 0, said.err
    reader = read_gguf(out)
    assert text_of(reader, "general.type") == "adapter"
    assert text_of(reader, "adapter.type") == "lora"
    assert reader.get_field("adapter.lora.alpha").contents() == 16.0
    assert len(reader.tensors) == 2 * 2 * 7
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}


def test_gguf_of_the_whole_model_is_read_back(chain: tiny.Chain, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    said = export("gguf", chain.release, "--out", out, "--merged")
    assert said.code == 0, said.err
    reader = read_gguf(out)
    assert text_of(reader, "general.architecture") == "llama"
    assert text_of(reader, "tokenizer.chat_template").strip() == (
        (tiny.base() / "chat_template.jinja").read_text().strip()
    )
    assert reader.get_field("llama.block_count").contents() == 2
    assert len(reader.get_field("tokenizer.ggml.tokens").data) == 512
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (128, 512)
    assert len(shapes) == 3 + 2 * 9
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1} == {"F16"}


def test_the_vllm_command_names_rank_template_and_date(chain: tiny.Chain) -> None:
    words = shlex.split(tiny.done("export", "vllm", chain.release).out)
    assert words[:3] == ["vllm", "serve", tiny.BASE_ID]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert words[3] == "--enable-lora"
    assert options["--max-lora-rank"] == "8"
    assert options["--lora-modules"] == f"release={chain.release.resolve()}"
    assert options["--chat-template"] == str(chain.release.resolve() / "chat_template.jinja")
    assert json.loads(options["--default-chat-template-kwargs"]) == {"date_string": "26 Jul 2024"}


def test_the_ollama_folder_holds_a_model_and_its_template(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    out = tmp_path / "ollama"
    said = export("ollama", chain.release, "--out", out)
    assert said.code == 0, said.err
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\n")
    assert "Today Date: 26 Jul 2024\n" in modelfile
    assert "{{ .System }}" in modelfile
    assert "PARAMETER stop <|eot_id|>" in modelfile
    assert text_of(read_gguf(out / "model.gguf"), "general.architecture") == "llama"


def test_push_says_what_it_would_upload(chain: tiny.Chain) -> None:
    said = export("push", chain.release, "--repository", "a/b")
    assert said.code == 0, said.err
    assert said.out.startswith("would upload to a/b (private): README.md, SHA256SUMS")
    assert all(path.name in said.out for path in chain.release.iterdir())


def test_push_of_a_broken_release_is_refused(release: Path) -> None:
    (release / "README.md").write_text("other")
    said = export("push", release, "--repository", "a/b")
    assert (said.code, "changed: README.md" in said.err) == (3, True)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("onnx", "merged, gguf, vllm, ollama or push"),
        ("merged", "export merged needs --out"),
        ("push", "export push needs --repository"),
    ],
)
def test_an_export_that_cannot_be_made_says_so(chain: tiny.Chain, form: str, named: str) -> None:
    said = export(form, chain.release)
    assert (said.code, named in said.err) == (1, True), said.err
