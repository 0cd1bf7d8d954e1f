"""Merged, GGUF, vLLM and Ollama forms of a release, read back and held against the adapter."""

import json
import re
import shlex
import shutil
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_release import built, rewrite_sums
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from fintune.chat import ChatFormat
from fintune.cli import app
from fintune.errors import GateRefused, ModelError, OutputError
from fintune.example import Message
from fintune.model import load_release, release_base
from fintune.releasing import export
from fintune.releasing import gguf as writing
from fintune.releasing.golden import CONVERSATIONS
from fintune.untrusted.static import template_reaches

DATE = "26 Jul 2024"


@pytest.fixture(scope="module", name="built")
def _built() -> tuple[Path, Path]:
    return built()


def test_merged_model_answers_as_the_adapter(built: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = built
    out = export.merged(folder, tmp_path / "merged", base=base, dtype="fp32")
    adapter = load_release(folder, release_base(folder, base), dtype="fp32").model
    whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = ChatFormat(tokenizer, DATE)
    for messages in CONVERSATIONS.values():
        ids = torch.tensor([chat.prompt_ids(messages)])
        with torch.inference_mode():
            assert (adapter(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max() < 1e-4
            greedy = [
                model.generate(input_ids=ids, do_sample=False, max_new_tokens=16).tolist()
                for model in (adapter, whole)
            ]
        assert greedy[0] == greedy[1]
    with pytest.raises(OutputError, match="exists"):
        export.merged(folder, out, base=base)


def test_merge_is_refused_when_logits_differ(
    built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = built
    monkeypatch.setattr(export, "MERGE_LIMIT", 0.0)
    with pytest.raises(GateRefused, match="logits differ"):
        export.merged(folder, tmp_path / "merged", base=base)
    assert [path.name for path in tmp_path.iterdir()] == [".merged.lock"]


def test_gguf_model_reads_back(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Every tensor under llama.cpp's name, q and k in its order, vocabulary with its types."""
    folder, base = built
    path = export.gguf(folder, tmp_path / "model.gguf", base=base, dtype="f32", merged=True)
    reader = gguf_package.GGUFReader(path)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    model = load_release(folder, release_base(folder, base), dtype="fp32").model.merge_and_unload()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    assert len(found) == len(weights) == 21
    same = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    }
    for name, source in same.items():
        np.testing.assert_allclose(found[name], weights[source], atol=1e-6)
    # Row i of a head's first half and of its second half become rows 2i and 2i + 1.
    query, key = (weights[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qk")
    for name, source in (("blk.0.attn_q.weight", query), ("blk.0.attn_k.weight", key)):
        head, half = 16, 8
        for row in (0, 3, 7, 16, 21):
            first = row // head * head + row % head // 2 + (row % 2) * half
            np.testing.assert_allclose(found[name][row], source[first], atol=1e-6)
    fields = reader.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    control = {t for t, kind in zip(tokens, types, strict=True) if kind == 3}
    assert {"<|begin_of_text|>", "<|eot_id|>"} <= control and "a" not in control
    assert tokens[fields["tokenizer.ggml.eot_token_id"].contents()] == "<|eot_id|>"
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    assert fields["llama.attention.head_count_kv"].contents() == 2


def test_gguf_adapter_reads_back(built: tuple[Path, Path], tmp_path: Path) -> None:
    """B·A of the file equals the change that merging makes, in llama.cpp's row order."""
    folder, base = built
    path = export.gguf(folder, tmp_path / "adapter.gguf", base=base, dtype="f32")
    reader = gguf_package.GGUFReader(path)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(found) == 2 * 7 * 2
    assert reader.fields["general.type"].contents() == "adapter"
    scale = reader.fields["adapter.lora.alpha"].contents() / 4
    change = scale * found["blk.1.attn_q.weight.lora_b"] @ found["blk.1.attn_q.weight.lora_a"]
    before = load_file(base / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    model = load_release(folder, release_base(folder, base), dtype="fp32").model.merge_and_unload()
    after = model.state_dict()["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_allclose(change, writing.permute(after - before, 4).numpy(), atol=1e-5)


def test_rope_table_is_that_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters=rope,
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500_000.0 ** -(torch.arange(0, 128, 2) / 128)
    factors = writing.rope_factors(config)
    assert factors is not None
    torch.testing.assert_close(plain / torch.from_numpy(factors), scaled, rtol=1e-5, atol=0)
    assert (factors.min(), factors.max()) == (1.0, 8.0)


def test_vllm_command_names_rank_template_and_date(built: tuple[Path, Path]) -> None:
    folder, _ = built
    words = shlex.split(export.vllm(folder))
    assert words[:3] == ["vllm", "serve", "fintune/tiny"]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert words[words.index("--default-chat-template-kwargs") + 1] == f'{{"date_string":"{DATE}"}}'


def _go(template: str, messages: list[Message]) -> str:
    """The few words of Go's text/template that the Modelfile uses."""
    system = next((m.content for m in messages if m.role == "system"), "")
    pattern = (
        r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}\{\{ range \.Messages \}\}"
    )
    match = re.match(pattern, template, flags=re.S)
    assert match is not None
    body, tail = template[match.end() :].split("{{ end }}{{ end }}")
    user, answer = body.removeprefix('{{ if eq .Role "user" }}').split(
        '{{ else if eq .Role "assistant" }}'
    )
    text = match.group(1).replace("{{ .System }}", system) if system else match.group(2)
    for message in messages:
        if message.role != "system":
            turn = user if message.role == "user" else answer
            text += turn.replace("{{ .Content }}", message.content)
    return text + tail


def test_ollama_renders_the_trained_prompt(built: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = built
    out = export.ollama(folder, tmp_path / "ollama", base=base)
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]
    modelfile = (out / "Modelfile").read_text()
    assert "PARAMETER stop <|eot_id|>" in modelfile
    template = modelfile.split('"""')[1]
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder), DATE)
    for messages in CONVERSATIONS.values():
        prompt = chat.render(messages[:-1], prompt=True)
        assert "<|begin_of_text|>" + _go(template, messages[:-1]) == prompt


def test_push_is_dry_by_default(built: tuple[Path, Path]) -> None:
    folder, base = built
    plan = export.push(folder, "someone/tiny", base=base)
    assert plan.startswith("would upload to someone/tiny (private): README.md, SHA256SUMS")


def test_vllm_refuses_what_it_cannot_load(built: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built[0], tmp_path / "copy"))
    tree = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(tree | {"r": 1024, "use_dora": True}))
    rewrite_sums(copy)
    with pytest.raises(ModelError, match="use_dora, rank 1024"):
        export.vllm(copy)


def test_real_llama_template_passes_and_becomes_ollamas() -> None:
    folder = Path(__file__).parents[2] / "shared" / "tokenizers" / "llama3"
    if not folder.is_dir():
        pytest.skip("no ../shared/tokenizers/llama3")
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder), DATE)
    assert template_reaches(chat.template) == ""
    template = export.ollama_modelfile(chat).split('"""')[1]
    for messages in CONVERSATIONS.values():
        prompt = chat.render(messages[:-1], prompt=True)
        assert "<|begin_of_text|>" + _go(template, messages[:-1]) == prompt


def test_forms_have_their_own_options(built: tuple[Path, Path], tmp_path: Path) -> None:
    """A precision or an option that a form does not have is a usage error, exit 2."""
    folder, base = map(str, built)
    runner, out = CliRunner(), str(tmp_path / "out")
    wrong = (
        ["merged", folder, "--out", out, "--dtype", "f16"],
        ["gguf", folder, "--out", out, "--dtype", "bf16"],
        ["gguf", folder, "--out", out, "--merged", "--dtype", "F32"],
        ["ollama", folder, "--out", out, "--dtype", "fp32"],
        ["push", folder, "--repository", "a/b", "--dtype", "f16"],
        ["vllm", folder, "--out", out],
        ["merged", folder],
        ["push", folder],
        ["onnx", folder],
    )
    for words in wrong:
        assert runner.invoke(app, ["export", *words]).exit_code == 2, words
    done = runner.invoke(app, ["export", "gguf", folder, "--out", out, "--base", base])
    assert (done.exit_code, done.stdout.strip()) == (0, out)
    again = runner.invoke(app, ["export", "gguf", folder, "--out", out, "--base", base])
    assert isinstance(again.exception, OutputError)
    assert runner.invoke(app, ["export", "vllm", folder]).stdout.startswith("vllm serve")
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["out"]
