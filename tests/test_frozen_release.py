"""Frozen: what a release holds, what verify accepts and refuses, and every form it exports."""

import json
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frozen
import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
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


# ---- the release -----------------------------------------------------------------------------


def test_the_release_is_the_frozen_one(chain: tiny.Chain) -> None:
    assert frozen.of_release(chain.release) == frozen.frozen()["release"]


def test_sha256sum_verifies_it(chain: tiny.Chain) -> None:
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    checked = subprocess.run(command, cwd=chain.release, capture_output=True, text=True, check=True)
    listed = {line.partition(":")[0] for line in checked.stdout.splitlines()}
    assert listed == {path.name for path in chain.release.iterdir()} - {"SHA256SUMS"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in chain.release.iterdir()}
    assert modes == {0o644}


def test_its_parts_are_those_of_the_run_and_the_evaluation(chain: tiny.Chain) -> None:
    for folder, name in (
        (chain.run / "best", "adapter_model.safetensors"),
        (chain.eval, "test_results.json"),
        (chain.eval, "report.html"),
        (tiny.base(), "chat_template.jinja"),
    ):
        assert (chain.release / name).read_bytes() == (folder / name).read_bytes()
    facts = frozen.read_json(chain.release / "training_config.json")["provenance"]
    assert facts["adapter_sha256"] == tiny.file_sha256(chain.release / "adapter_model.safetensors")
    assert facts["accepted"] == tiny.REASON
    assert facts["base_sha256"] == tiny.file_sha256(tiny.base() / "model.safetensors")


def test_its_files_state_the_hashes_of_all_others(chain: tiny.Chain) -> None:
    stated = frozen.read_json(chain.release / "training_config.json")["files"]
    last = {"training_config.json", "README.md", "SHA256SUMS"}
    assert stated == {k: v for k, v in tiny.tree_sha256(chain.release).items() if k not in last}
    digest = tiny.file_sha256(chain.release / "training_config.json")
    assert digest in (chain.release / "README.md").read_text()


def test_the_card_says_what_was_measured(chain: tiny.Chain) -> None:
    card = (chain.release / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["base_model"] == tiny.BASE_ID
    assert facts["library_name"] == "peft"
    results = frozen.read_json(chain.eval / "test_results.json")
    assert f"{100 * results['accuracy']['adapter']:.1f}" in text
    assert "no detectable difference" in text and tiny.REASON in text


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
        dated = {"tokenize": False, **fixture["chat"]["variables"]}
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
    named = "files: a pickle (--no-pickle): training_args.bin"
    assert (refused.code, named in refused.err) == (3, True), refused.err


# ---- verify ----------------------------------------------------------------------------------


def test_verify_accepts_it_and_names_its_checks(chain: tiny.Chain) -> None:
    checks = json.loads(verify(chain.release, "--json").out)
    unusual = {check["name"]: check["detail"] for check in checks if check["status"] != "ok"}
    assert unusual.keys() == {"accepted", "verdict"}
    assert unusual["verdict"] == "no_detectable_difference"
    assert unusual["accepted"].startswith("although no_detectable_difference, ")
    assert unusual["accepted"].endswith(f": {tiny.REASON}")
    names = ["files", "checksums", "provenance", "card", "config", "code hooks", "template"]
    names += ["weights", "paths", "base", "tokenizer", "tokenizer", "stop tokens", "fixture"]
    names += ["keys", "load", "answers", "accepted", "age", "verdict"]
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


def test_a_refusal_has_its_table_and_its_json_up_to_the_first_failed_stage(release: Path) -> None:
    (release / "README.md").write_text("other")
    said = verify(release)
    assert said.code == 3
    assert re.search(r"checksums \S* *failed \S* *changed: README\.md", said.out), said.out
    found = verify(release, "--json")
    checks = {check["name"]: check["status"] for check in json.loads(found.out)}
    assert (found.code, checks) == (3, {"files": "ok", "checksums": "failed"})


def test_one_bit_under_rewritten_hashes_is_refused_by_the_answers(release: Path) -> None:
    path = release / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40  # the highest bit of an exponent: a weight of 1e-2 becomes 1e36
    path.write_bytes(data)
    tiny.rewrite_stated(release)
    said = verify(release)
    assert (said.code, "answers: " in said.err) == (3, True), said.err


def changed_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of the adapter's tensors."""

    def breaks(release: Path) -> None:
        path = release / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return breaks


def changed_json(name: str, **values: object) -> Callable[[Path], None]:
    """Other values in a file of settings."""
    return lambda release: edited(release / name, values)


def edited(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(frozen.read_json(path) | values))


def written(name: str, text: str) -> Callable[[Path], None]:
    """A file of this text."""
    return lambda release: (release / name).write_text(text) and None


def no_effect(tensors: dict[str, Any]) -> None:
    for name, value in tensors.items():
        value *= 0 if "lora_B" in name else 1


def not_a_number(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


B = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (written("model.bin", "x"), "pickle: reading it can run code: model.bin"),
    "an unknown file": (written("setup.py", ""), "not in the allow-list: setup.py"),
    "no weights": (
        lambda release: (release / "adapter_model.safetensors").unlink(),
        "missing: adapter_model.safetensors",
    ),
    "empty weights": (changed_weights(dict.clear), "weights: empty"),
    "weights of zero": (changed_weights(no_effect), "weights: every B matrix is zero"),
    "weights that are no numbers": (changed_weights(not_a_number), "weights: NaN"),
    "a missing key": (changed_weights(lambda t: t.pop(B)), "keys: missing key base_model"),
    "an extra key": (
        changed_weights(lambda t: t.update({B.replace(".0.", ".9."): torch.ones(64, 8)})),
        "keys: extra key base_model",
    ),
    "another revision": (
        changed_json("adapter_config.json", revision="0" * 64),
        "trained on another base",
    ),
    "code beside the adapter": (
        changed_json("adapter_config.json", auto_mapping={"base_model_class": "Evil"}),
        "asks to import code (adapter_config.json: auto_mapping)",
    ),
    "code beside the tokenizer": (
        changed_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["x--y.Z", None]}),
        "asks to import code (tokenizer_config.json: auto_map)",
    ),
    "a base by a local path": (
        changed_json("adapter_config.json", base_model_name_or_path="/home/someone/base"),
        "no public model id",
    ),
    "another template": (
        written("chat_template.jinja", "{{ bos_token }}<|eot_id|>"),
        "the chat template is not the one it was trained with",
    ),
    "a template that reaches out": (
        written("chat_template.jinja", "{{ ''.__class__ }}"),
        "template: reaches for __class__",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_release_is_refused_by_name(release: Path, what: str) -> None:
    breaks, said = BROKEN[what]
    breaks(release)
    at_once = what in ("a pickle", "an unknown file", "no weights")  # by names, before any hash
    for redo, named in (
        (None, "checksums: changed: "),
        (tiny.rewrite_sums, "provenance: not the files that training_config.json names"),
        (tiny.rewrite_stated, said),
    ):
        if redo:
            redo(release)
        found = verify(release)
        assert found.code == 3
        (line,) = [line for line in found.err.splitlines() if line.startswith("error: ")]
        assert (said if at_once else named) in line
        assert at_once or named == said or said not in line


def test_settings_that_name_another_base_are_refused(release: Path) -> None:
    path = release / "training_config.json"
    facts = frozen.read_json(path)["provenance"]
    edited(path, {"provenance": facts | {"base_sha256": "0" * 64}})
    tiny.rewrite_sums(release)
    said = verify(release)
    named = "card: README.md says something else than training_config.json"
    assert (said.code, named in said.err) == (3, True), said.err
    tiny.rewrite_stated(release)
    said = verify(release)
    assert (said.code, "refused: base: trained on another base" in said.err) == (3, True), said.err


def test_another_base_of_the_same_shape_is_refused(chain: tiny.Chain, tmp_path: Path) -> None:
    other = shutil.copytree(tiny.base(), tmp_path / "base")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    said = tiny.fintune("verify", chain.release, "--base", other)
    assert (said.code, "base: trained on another base" in said.err) == (3, True), said.err


def test_a_folder_of_peft_alone_is_verified_as_far_as_it_can_be(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(chain.release / name, foreign)
    (foreign / "README.md").write_text("# An adapter\n")
    for path in tiny.base().glob("*token*"):
        shutil.copy(path, foreign)
    checks = json.loads(verify(foreign, "--json").out)
    notes = {check["name"] for check in checks if check["status"] == "note"}
    untold = {"age", "verdict"}
    assert notes == {"checksums", "provenance", "base", "template", "fixture"} | untold
    assert {check["status"] for check in checks} == {"ok", "note"}
    (foreign / "training_args.bin").write_bytes(b"x")
    said = verify(foreign)
    named = "a change cannot be noticed, and training_args.bin is a pickle"
    assert (said.code, named in said.err) == (3, True), said.err


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


def reordered(rows: Any, heads: int) -> Any:
    """Rows of q or k as llama.cpp has them: those of a head's halves take turns."""
    first, second = rows.reshape(heads, 2, -1, *rows.shape[1:]).unbind(1)
    return torch.stack((first, second), 2).reshape(rows.shape)


def stored(reader: Any) -> dict[str, Any]:
    """The tensors of a GGUF file, by name."""
    return {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def test_gguf_of_the_adapter_is_read_back(chain: tiny.Chain, tuned: Any, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    said = export("gguf", chain.release, "--out", out, "--dtype", "f32")
    assert said.code == 0, said.err
    reader = read_gguf(out)
    assert text_of(reader, "general.type") == "adapter"
    assert text_of(reader, "adapter.type") == "lora"
    assert reader.get_field("adapter.lora.alpha").contents() == 16.0
    found = stored(reader)
    assert len(found) == 2 * 2 * 7
    layer = tuned.base_model.model.model.layers[1].self_attn.q_proj
    made = found["blk.1.attn_q.weight.lora_b"] @ found["blk.1.attn_q.weight.lora_a"]
    change = layer.get_delta_weight("default").detach()  # the scale is alpha / rank
    torch.testing.assert_close(made * 16 / 8, reordered(change, 4), rtol=0, atol=1e-6)


def test_gguf_of_the_whole_model_is_read_back(
    chain: tiny.Chain, tuned: Any, tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    said = export("gguf", chain.release, "--out", out, "--merged", "--dtype", "f32")
    assert said.code == 0, said.err
    reader = read_gguf(out)
    assert text_of(reader, "general.architecture") == "llama"
    assert text_of(reader, "tokenizer.ggml.pre") == "llama-bpe"
    assert text_of(reader, "tokenizer.chat_template").strip() == (
        (tiny.base() / "chat_template.jinja").read_text().strip()
    )
    assert reader.get_field("llama.block_count").contents() == 2
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    control = {text for text, kind in zip(tokens, types, strict=True) if kind == 3}
    assert {"<|begin_of_text|>", "<|eot_id|>"} <= control
    assert "a" not in control
    assert tokens[reader.get_field("tokenizer.ggml.eot_token_id").contents()] == "<|eot_id|>"
    found = stored(reader)
    assert len(found) == 3 + 2 * 9
    layers = tuned.base_model.model.model.layers
    attention = layers[0].self_attn

    def merged(module: Any) -> Any:
        return (module.weight + module.get_delta_weight("default")).detach()

    for name, expected in {
        "token_embd.weight": tuned.get_input_embeddings().weight.detach(),
        "blk.0.attn_q.weight": reordered(merged(attention.q_proj), 4),
        "blk.0.attn_k.weight": reordered(merged(attention.k_proj), 2),
        "blk.1.attn_v.weight": merged(layers[1].self_attn.v_proj),
        "blk.0.ffn_down.weight": merged(layers[0].mlp.down_proj),
    }.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_gguf_is_f16_where_nothing_is_said(chain: tiny.Chain, tmp_path: Path) -> None:
    said = export("gguf", chain.release, "--out", tmp_path / "a.gguf")
    assert said.code == 0, said.err
    assert {t.tensor_type.name for t in read_gguf(tmp_path / "a.gguf").tensors} == {"F16"}


def test_the_vllm_command_names_rank_template_and_date(chain: tiny.Chain) -> None:
    words = shlex.split(tiny.done("export", "vllm", chain.release).out)
    assert words[:3] == ["vllm", "serve", tiny.BASE_ID]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert words[3] == "--enable-lora"
    assert options["--max-lora-rank"] == "8"
    assert options["--lora-modules"] == f"release={chain.release.resolve()}"
    assert options["--chat-template"] == str(chain.release.resolve() / "chat_template.jinja")
    assert json.loads(options["--default-chat-template-kwargs"]) == {"date_string": "26 Jul 2024"}


def in_go(template: str, messages: list[dict[str, str]]) -> str:
    """The few words of Go's text/template that the Modelfile uses."""
    opening = r"\{\{ if \.System }}(.*?)\{\{ else }}(.*?)\{\{ end }}\{\{ range \.Messages }}"
    start = re.match(opening, template, re.DOTALL)
    assert start is not None
    body, tail = template[start.end() :].split("{{ end }}{{ end }}")
    user, answer = body.removeprefix('{{ if eq .Role "user" }}').split(
        '{{ else if eq .Role "assistant" }}'
    )
    system = "".join(turn["content"] for turn in messages if turn["role"] == "system")
    text = start[1].replace("{{ .System }}", system) if system else start[2]
    for turn in messages:
        form = {"user": user, "assistant": answer, "system": ""}[turn["role"]]
        text += form.replace("{{ .Content }}", turn["content"])
    return text + tail


def test_the_ollama_folder_holds_a_model_and_renders_the_trained_prompt(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    out = tmp_path / "ollama"
    said = export("ollama", chain.release, "--out", out)
    assert said.code == 0, said.err
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\n")
    assert "PARAMETER stop <|eot_id|>" in modelfile
    template = modelfile.split('"""')[1]
    for row in frozen.read_json(chain.release / "prompt_fixture.json")["conversations"]:
        prompt = "<|begin_of_text|>" + in_go(template, row["messages"][:-1])
        assert prompt == row["prompt"], row["name"]
    assert text_of(read_gguf(out / "model.gguf"), "general.architecture") == "llama"


def test_push_says_what_it_would_upload(chain: tiny.Chain) -> None:
    said = export("push", chain.release, "--repository", "a/b")
    assert said.code == 0, said.err
    assert said.out.startswith("would upload to a/b (private): README.md, SHA256SUMS")
    assert all(path.name in said.out for path in chain.release.iterdir())


@pytest.mark.parametrize("form", ["merged", "gguf", "ollama", "vllm", "push"])
def test_no_form_is_made_of_a_broken_release(release: Path, tmp_path: Path, form: str) -> None:
    (release / "README.md").write_text("other")
    base = ["--base", tiny.base()]
    words = {"vllm": [], "push": [*base, "--repository", "a/b"]}
    said = tiny.fintune(
        "export", form, release, *words.get(form, [*base, "--out", tmp_path / "made"])
    )
    assert (said.code, "changed: README.md" in said.err) == (3, True), said.err
    assert {path.name for path in tmp_path.iterdir()} - {".made.lock"} == {"release"}
    assert said.out == ""


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("onnx", "No such command 'onnx'"),
        ("merged", "Missing option '--out'"),
        ("push", "Missing option '--repository'"),
    ],
)
def test_an_export_that_cannot_be_made_says_so(chain: tiny.Chain, form: str, named: str) -> None:
    said = export(form, chain.release)
    assert (said.code, named in said.err) == (2, True), said.err
