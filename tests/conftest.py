"""Shared fixtures: one thread, no network, and the folder of real data where there is one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fintune import nano
from fintune.config import load_config
from fintune.data.prepare import prepare

os.environ["HF_HUB_OFFLINE"] = "1"
SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny matrices: a second thread costs more in waiting than it computes.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real rows and the real Llama 3 tokenizer, beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 0.6 M parameters in fp32 with the nano base's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-base")
    for path in nano.base_dir().glob("*"):
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    config = LlamaConfig.from_pretrained(nano.base_dir())
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Folder of prepared data: 260 of the bundled rows."""
    root = tmp_path_factory.mktemp("prepared")
    lines = nano.rows_path().read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "rows.jsonl").write_text("".join(lines[:260]), encoding="utf-8")
    changes = [f"data.source={root / 'rows.jsonl'}", f"out={root}", f"model.path={tiny_base}"]
    prepare(load_config("nano", [*changes, "model.id=test/tiny"]))
    return root / "data"


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tiny.Chain:
    """Prepare, train, eval and release on the tiny base; read only."""
    return tiny.make_chain(tmp_path_factory.mktemp("chain") / "tiny")


@pytest.fixture(scope="session")
def server(chain: tiny.Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny.Server]:
    """The chain's release, served without a key."""
    serving = tiny.Server(chain.release, tmp_path_factory.mktemp("server") / "log")
    yield serving
    serving.stop()
