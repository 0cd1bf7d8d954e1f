"""Shared fixtures: one thread, no network, and the folder of real data where there is one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_made
import torch

from fintune import sample
from fintune.config import load_config
from fintune.data.prepare import prepare
from fintune.evals import kept

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # see bench/bases.py: loading threads in a fork
SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny matrices: a second thread costs more in waiting than it computes.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _answers_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No answer of the base is one that other code has given."""
    kept.FILE = str(tmp_path_factory.mktemp("kept") / kept.FILE)  # absolute: the cache is left out


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real rows and the real Llama 3 tokenizer, beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random base for the sample rows."""
    return tiny_made.wide_base(tmp_path_factory.mktemp("tiny-base") / "base")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Folder of prepared data: 260 of the bundled rows."""
    root = tmp_path_factory.mktemp("prepared")
    lines = sample.rows_path().read_text(encoding="utf-8").splitlines(keepends=True)
    short = [line for line in lines if '"messages"' not in line]  # no conversations
    (root / "rows.jsonl").write_text("".join(short[:260]), encoding="utf-8")
    changes = [f"data.source={root / 'rows.jsonl'}", f"out={root}", f"model.path={tiny_base}"]
    prepare(load_config("demo", [*changes, "model.id=test/tiny"]))
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
