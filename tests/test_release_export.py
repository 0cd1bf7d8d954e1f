"""Exports beyond the frozen tests: options, limits of vLLM, Llama's template and rotary table."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fintune.chat import ChatFormat
from fintune.config import ChatConfig
from fintune.example import Message
from fintune.releasing import export
from fintune.releasing import gguf as writing
from fintune.releasing.verify import CONVERSATIONS
from fintune.untrusted.static import template_reaches


def test_rope_table_is_that_of_transformers() -> None:
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


def test_vllm_refuses_what_it_cannot_load(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "release").release
    tree = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(tree | {"r": 1024, "use_dora": True}))
    tiny.rewrite_stated(copy)
    said = tiny.fintune("export", "vllm", copy)
    assert (said.code, "use_dora, rank 1024" in said.err) == (1, True), said.err


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


def test_real_llama_template_passes_and_becomes_ollamas() -> None:
    folder = tiny.SHARED / "tokenizers" / "llama3"
    if not folder.is_dir():
        pytest.skip("no ../shared/tokenizers/llama3")
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder), ChatConfig())
    assert template_reaches(chat.template) == ""
    template = export.ollama_modelfile(chat).split('"""')[1]
    for messages in CONVERSATIONS.values():
        prompt = chat.template.render(messages[:-1], prompt=True)
        assert "<|begin_of_text|>" + _go(template, messages[:-1]) == prompt


def test_forms_have_their_own_options(chain: tiny.Chain, tmp_path: Path) -> None:
    """A precision or an option that a form does not have is a usage error, exit 2."""
    folder, out = chain.release, tmp_path / "out"
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
        assert tiny.fintune("export", *words).code == 2, words
    given = ("export", "gguf", folder, "--out", out, "--base", tiny.base())
    assert tiny.done(*given).out.strip() == str(out)
    again = tiny.fintune(*given)
    assert (again.code, "exists" in again.err) == (1, True)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["out"]
