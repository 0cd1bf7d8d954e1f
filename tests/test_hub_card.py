"""The card of a release on the hub: metadata, and snippets that load base and adapter by id."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tiny
import tiny_hub
from hub.server import Hub
from huggingface_hub import EvalResult, ModelCard, snapshot_download
from pydantic import BaseModel, ConfigDict, Field
from tiny_release import tiny_base, tiny_release, tiny_run

ID, BASE_ID, ROWS_ID = "alice/adapter", "fintune/tiny", "acme/rows"
COMMIT = "c" * 40
SIX_TAGS = {"lora", "finance", "instruction-tuning", "english", "transformers", "adapter"}

Id = Annotated[str, Field(pattern=r"^[\w-][\w.-]*/[\w-][\w.-]*$", max_length=96)]
Text = Annotated[str, Field(min_length=1)]
Tag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9:._-]*$")]
LICENCES = Literal[
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "other", "unknown",
]  # fmt: skip


class Part(BaseModel):
    """A part of a card's metadata that holds no key but these."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Task(Part):
    type: Literal["text-generation"]
    name: Text | None = None


class Dataset(Part):
    type: Text
    name: Text
    config: Text | None = None
    split: Text | None = None
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None


class Metric(Part):
    type: Literal["accuracy", "loss"]
    value: Annotated[float, Field(allow_inf_nan=False)]
    name: Text | None = None


class Result(Part):
    task: Task
    dataset: Dataset
    metrics: Annotated[list[Metric], Field(min_length=1)]


class Model(Part):
    name: Text
    results: Annotated[list[Result], Field(min_length=1)]


class Metadata(Part):
    """What the hub takes of a model card (hub-docs, modelcard.md), for an adapter of ours."""

    base_model: Id
    base_model_relation: Literal["adapter"]
    library_name: Literal["peft"]
    pipeline_tag: Literal["text-generation"]
    language: Literal["en"] | None = None
    license: LICENCES | None = None
    datasets: list[Id] | None = None
    tags: list[Tag]
    models: Annotated[list[Model], Field(alias="model-index", min_length=1, max_length=1)]


def metadata(folder: Path) -> Any:
    """The card's metadata, which the schema and huggingface_hub's own classes take."""
    data = ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data
    text = (folder / "README.md").read_text().split("---\n")[1]
    assert data.to_yaml() + "\n" == text, "what is read is written again as it was"
    Metadata.model_validate(data.to_dict())
    return data


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Hub]]:
    """A release whose base and rows are commits of a hub, pushed there."""
    root = tmp_path_factory.mktemp("card")
    with Hub(root / "served") as hub:
        hub.tokens["hf_alice"] = ["alice"]
        files = {path.name: path for path in tiny_base(root / "base").iterdir()}
        commit = hub.commit("model", BASE_ID, files)
        with tiny_hub.client(hub, root / "alice", "hf_alice"):
            base = Path(snapshot_download(BASE_ID))
            config = tiny_run(root / "out", base, license="apache-2.0")
            tiny.reseal(config.run_dir, base={"revision": commit})
            manifest = json.loads((config.data_dir / "manifest.json").read_text())
            manifest["sources"] = {ROWS_ID: {"identity": COMMIT, "licence": "mit"}}
            (config.data_dir / "manifest.json").write_text(json.dumps(manifest))
            tiny.reseal(config.data_dir)
            folder = tiny_release(config)
            tiny.done("export", "push", folder, "--repository", ID, "--public", "--really")
        yield folder, hub


@pytest.fixture
def card(published: tuple[Path, Hub], tmp_path: Path) -> str:
    """The pushed card, as a stranger fetches it."""
    with tiny_hub.client(published[1], tmp_path / "home"):
        return (Path(snapshot_download(ID)) / "README.md").read_text()


def test_what_the_hub_reads_is_there(published: tuple[Path, Hub]) -> None:
    data = metadata(published[0])
    assert {*data.tags} == SIX_TAGS and data.datasets == [ROWS_ID]
    assert (data.language, data.license, data.base_model) == ("en", "apache-2.0", BASE_ID)
    where = {"dataset_split": "test", "dataset_revision": COMMIT}
    of = ("text-generation", ROWS_ID, ROWS_ID)
    wanted = [EvalResult(*of, "loss", 1.25, **where), EvalResult(*of, "accuracy", 0.75, **where)]
    assert data.eval_results == wanted
    assert "| acme/rows | cccccccccc" in (published[0] / "README.md").read_text()


def test_local_rows_are_no_data_set_of_the_hub(chain: tiny.Chain, tmp_path: Path) -> None:
    data = metadata(chain.release)
    assert data.datasets is None and {*data.tags} == SIX_TAGS
    assert [result.dataset_name for result in data.eval_results] == ["held-out rows"] * 2
    copy = chain.copy(tmp_path / "copy", "data", "run", "eval")
    text = (copy.run / "config.yaml").read_text()
    assert "filter_english_only: true" in text
    (copy.run / "config.yaml").write_text(text.replace("_only: true", "_only: false"))
    tiny.reseal(copy.run)
    tiny.done("release", *copy.words())
    data = metadata(copy.release)
    assert data.language is None and {*data.tags} == SIX_TAGS - {"english"}


def test_the_pushed_card_is_the_release_s_but_for_the_repository(
    published: tuple[Path, Hub], card: str
) -> None:
    ours = (published[0] / "README.md").read_text().splitlines()
    changed = [(a, b) for a, b in zip(ours, card.splitlines(), strict=True) if a != b]
    assert changed[:2] == [('adapter = "."', f'adapter = "{ID}"')] * 2
    assert changed[2][1].endswith(f"--lora-modules tiny={ID}") and len(changed) == 3


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.S)


def run(hub: Hub, home: Path, code: str) -> list[str]:
    """Lines that code prints in a process that knows the hub by HF_ENDPOINT alone."""
    words = [sys.executable, "-c", code]
    env = hub.env(home) | {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_snippets_load_base_and_adapter_by_id(
    published: tuple[Path, Hub], card: str, tmp_path: Path
) -> None:
    """The published snippet takes today's base, the first one the base that it was trained on."""
    hub, (pinned, seed) = published[1], snippets(card)
    theirs = tiny.SHARED / "seed-model-card.md"
    if theirs.is_file():
        names = re.compile(r'^((?:base|adapter) = )".*"$', flags=re.M)
        (wanted,) = snippets(theirs.read_text())
        assert names.sub(r"\1", seed) == names.sub(r"\1", wanted)
    repo = hub.repos["model", BASE_ID]
    trained = repo.at("main").id
    other = tiny_base(tmp_path / "other", seed=1) / "model.safetensors"
    moved = hub.commit("model", BASE_ID, {other.name: other})
    try:
        lines = run(hub, tmp_path / "home", pinned + seed)
    finally:
        repo.refs["refs/heads/main"] = trained
    asked = "Explain what a yield curve inversion implies for equities."
    assert [line for line in lines if line.startswith(asked)]
    assert len(lines) > 1
    snapshots = tmp_path / "home" / "hub" / "models--fintune--tiny" / "snapshots"
    weights = {path.parent.name for path in snapshots.glob("*/model.safetensors")}
    assert weights == {trained, moved}


def test_vllm_is_told_the_commit(published: tuple[Path, Hub], card: str) -> None:
    commit = published[1].repos["model", BASE_ID].at("main").id
    assert f"vllm serve {BASE_ID} --revision {commit} --enable-lora" in card


def test_the_pushed_release_is_verified_by_its_id_and_its_base_by_commit(
    published: tuple[Path, Hub], tmp_path: Path
) -> None:
    with tiny_hub.client(published[1], tmp_path / "home"):
        found = tiny.answer_json("verify", ID)
    assert {c["status"] for c in found if c["name"] not in tiny.GATE} == {"ok"}
    assert f"{BASE_ID} at " in next(c["detail"] for c in found if c["name"] == "base")
