"""The published recipe by id, end to end: base and rows from a hub, release, push, verify, snippet.

The base has the shape of Llama 3.1 at two layers and the real Llama 3 tokenizer, and is gated.
`make test-all` runs it: 2 minutes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hub.server import Hub
from transformers import LlamaConfig, LlamaForCausalLM

from fintune import sample

BASE_ID = "meta-llama/Meta-Llama-3.1-8B-Instruct"
ROWS_ID = "Josephgflowers/Finance-Instruct-500k"
ID = "alice/Llama_for_Finance"
SMALL = {
    "train.max_steps": 2,
    "data.max_length": 256,
    "data.min_tokens": 5,
    "train.max_eval_samples": 2,
    "eval.max_items": 4,
    "eval.judged_items": 4,
    "eval.max_new_tokens": 4,
}
"""What makes the recipe small; no path, no id."""


def base_files(folder: Path) -> dict[str, Path]:
    """A Llama 3.1 of two layers with the real tokenizer and licence, random weights."""
    shape = LlamaConfig(
        vocab_size=128_256,
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
        bos_token_id=128_000,
        eos_token_id=[128_001, 128_008, 128_009],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    known = tiny.SHARED / "tokenizers" / "llama3"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(known / name, folder)
    shutil.copy(known / "LICENSE.llama3_1.txt", folder / "LICENSE")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.skipif(not os.environ.get("FINTUNE_TEST_ALL"), reason="2 minutes: make test-all")
@pytest.mark.skipif(
    not (tiny.SHARED / "tokenizers" / "llama3").is_dir(), reason="no ../shared/tokenizers/llama3"
)
def test_the_published_recipe_by_id(tmp_path: Path) -> None:
    with Hub(tmp_path / "served") as hub:
        hub.tokens |= {"hf_alice": ["alice"], "hf_bob": ["bob"]}
        base = hub.commit("model", BASE_ID, {**base_files(tmp_path / "base")})
        hub.repos["model", BASE_ID].gated = "manual"
        hub.repos["model", BASE_ID].accepted |= {"alice", "bob"}
        made = tiny.read_lines(sample.rows_path())
        card = b"---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Rows\n"
        files = {"train.json": json.dumps(made).encode(), "README.md": card}
        dataset = hub.commit("dataset", ROWS_ID, files)
        alice, bob = (
            hub.env(tmp_path / name, f"hf_{name}") | {"HF_HUB_OFFLINE": "0"}
            for name in ("alice", "bob")
        )
        work = tmp_path / "work"
        work.mkdir()

        def command(env: dict[str, str], *words: str, folder: Path = work) -> str:
            done = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        def fintune(env: dict[str, str], *words: str) -> str:
            return command(env, tiny.program(), *words)

        small = [word for key, value in SMALL.items() for word in ("-s", f"{key}={value}")]
        fintune(alice, "run", "-c", "llama-3.1-8b-finance", *small, "--accept", "two steps")
        release = work / "runs" / "llama-3.1-8b-finance" / "release"
        adapter = json.loads((release / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (BASE_ID, base)
        page = fintune(
            alice, "export", "push", str(release), "--repository", ID, "--public", "--really"
        )
        assert page.strip() == f"{hub.url}/{ID}/commit/{hub.repos['model', ID].at('main').id}"

        # A stranger, to whom nothing of alice's is known, after the base's main has moved.
        hub.commit("model", BASE_ID, {"README.md": b"moved"})
        found = json.loads(fintune(bob, "verify", ID, "--json"))
        assert {c["status"] for c in found if c["name"] not in tiny.GATE} == {"ok"}, found
        text = hub.repos["model", ID].at("main").files["README.md"].path.read_text()
        assert f"| {ROWS_ID} | {dataset} | apache-2.0 |" in text
        for line in ("license: llama3.1", f"- {ROWS_ID}", "- english", "# Llama-for-Finance"):
            assert f"\n{line}\n" in text, line

        (snippet,) = re.findall(
            r"```python\n(.*?)```", (tiny.SHARED / "seed-model-card.md").read_text(), re.DOTALL
        )
        assert f'base = "{BASE_ID}"\n' in snippet
        snippet = snippet.replace('adapter = "TimberGu/Llama_for_Finance"', f'adapter = "{ID}"')
        assert snippet in text, "the card's own first snippet"
        said = command(bob, sys.executable, "-c", snippet)
        assert said.startswith("Explain what a yield curve inversion implies for equities.")
