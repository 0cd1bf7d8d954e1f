"""GGUF files in llama.cpp itself: the same ids and the same greedy tokens.

llama-cpp-python is built from source (about six minutes), so this runs by `make test-gguf` alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_release import tiny_adapter

from fintune.chat import ChatFormat
from fintune.config import ChatConfig, ModelConfig
from fintune.example import Message
from fintune.model import LoadedRelease, find_base, load_adapter, load_base, load_tokenizer
from fintune.releasing import gguf
from fintune.sample import local_base

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not built here")
pytestmark = pytest.mark.slow
TOKENS = 24
QUESTIONS = [
    f"{company} had revenue of ${low}.5 million after ${low - 9}.0 million. What is the {what}?"
    for company, low in (("Acme", 40), ("Borealis", 95), ("Cobalt", 120), ("Delta", 310))
    for what in ("growth rate", "change in revenue", "margin if costs were half", "ratio", "tone")
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ChatFormat, Path, Path]:
    """Model with adapter, chat format, the base's GGUF with the adapter's, and the merged one."""
    folder = tmp_path_factory.mktemp("gguf")
    # The demo's base where its package is installed, as `make test-gguf` does.
    known = [line.partition("=")[2] for line in local_base()]
    base = find_base(ModelConfig(path=Path(*known) if known else tiny.base()))
    tokenizer = load_tokenizer(base)
    plain = load_base(base, "none", "fp32")
    loaded = LoadedRelease(base, plain, "fp32", ChatFormat(tokenizer, ChatConfig()))
    gguf.write_model(loaded, folder / "base.gguf", "f32", "base")
    # Small enough to leave the base its words: near ties of noise would part f16 from f32.
    adapter = tiny_adapter(base.folder, folder / "adapter", scale=0.03)
    gguf.write_adapter(adapter, base, folder / "adapter.gguf", "f32")
    model = load_adapter(plain, adapter)
    merged = load_adapter(load_base(base, "none", "fp32"), adapter).merge_and_unload()
    for dtype in ("f32", "f16"):
        path = folder / f"merged-{dtype}.gguf"
        gguf.write_model(replace(loaded, model=merged), path, dtype, "merged")
    return model, loaded.chat, folder, base.folder


def greedy(model: Any, ids: list[int]) -> list[int]:
    tensor = torch.tensor([ids])
    out = model.generate(
        input_ids=tensor, attention_mask=torch.ones_like(tensor), do_sample=False,
        max_new_tokens=TOKENS, eos_token_id=None,
    )  # fmt: skip
    return list(out[0, len(ids) :].tolist())


@pytest.mark.parametrize(
    ("name", "lora"),
    [("merged-f32.gguf", None), ("merged-f16.gguf", None), ("base.gguf", "adapter.gguf")],
)
def test_llama_cpp_says_the_same(
    parts: tuple[Any, ChatFormat, Path, Path], name: str, lora: str | None
) -> None:
    model, chat, folder, _ = parts
    changed = 0
    llama = llama_cpp.Llama(
        str(folder / name), lora_path=lora and str(folder / lora), n_ctx=512, verbose=False,
        logits_all=False, n_threads=1,
    )  # fmt: skip
    assert len(QUESTIONS) == 20
    equal = 0
    for text in QUESTIONS:
        messages = [Message("user", text)]
        ids = chat.prompt_ids(messages)
        rendered = chat.template.render(messages, prompt=True).encode()
        assert llama.tokenize(rendered, add_bos=False, special=True) == ids
        made = []
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            made.append(token)
            if len(made) == TOKENS:
                break
        equal += made == greedy(model, ids)
        with model.disable_adapter():
            changed += made != greedy(model, ids)
    assert changed > 10, f"the adapter changes {changed} of 20 answers, too few to show anything"
    assert equal == 20, f"{equal} of 20"


def test_a_gguf_form_is_held_against_the_adapter_as_trained(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    """`eval --form gguf:FILE`: the merged file answers as the adapter does, another base's not."""
    copy = chain.copy(tmp_path, "data", "run", "eval", "release")
    given = ("--base", tiny.base(), "--merged", "--dtype", "f32", "--out", tmp_path / "m.gguf")
    tiny.done("export", "gguf", copy.release, *given)
    found = tiny.answer_json("eval", *copy.words(), "--form", f"gguf:{tmp_path / 'm.gguf'}")
    assert found["equal"]["value"] >= 0.99 and found["equal"]["n"] >= 110
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    said = tiny.fintune("eval", *copy.words(), "--form", f"gguf:{tmp_path / 'cut.gguf'}")
    assert said.code == 1 and "does not load in llama.cpp" in said.err, said.err
