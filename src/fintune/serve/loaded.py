"""A release folder, loaded for use: one copy of the weights that answers as base and as adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fintune.chat import ChatFormat
from fintune.errors import ModelError, OutputError
from fintune.files import read_json
from fintune.model import (
    Base,
    end_token_ids,
    load_adapter,
    load_base,
    read_tokenizer,
    release_base,
    trained_revision,
)

FULL_CONTEXT = 8192
"""Most tokens of prompt and answer served here, also where the base could take more: one process
keeps every request's keys and values, and longer loads belong to vLLM."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Base with adapter, its chat format, the tokens that end an answer, and room in tokens."""

    base: Base
    model: Any
    chat: ChatFormat
    ends: list[int]
    context: int


def load(folder: Path, base: Path | None = None) -> Loaded:
    """Load a release (or any peft folder with a tokenizer) for inference.

    Args:
        base: folder of the base; absent: the bundled one, or the hub's by id and revision.

    Raises:
        OutputError: no such folder.
        ModelError: base, adapter or tokenizer does not load.
    """
    if not (folder / "adapter_config.json").is_file():
        raise OutputError(f"{folder} holds no adapter (adapter_config.json)", fix="fintune release")
    found, revision = release_base(folder, base), trained_revision(folder)
    if revision and len(revision) == len(found.revision) and revision != found.revision:
        raise ModelError(
            f"{folder.name} was trained on revision {revision[:12]} of {found.id},"
            f" {found.folder} is {found.revision[:12]}",
            why="on other weights an adapter answers nonsense",
            fix="give the base it was trained on (--base)",
        )
    tokenizer = read_tokenizer(folder)
    fixture = folder / "prompt_fixture.json"
    date = read_json(fixture)["date_string"] if fixture.is_file() else "26 Jul 2024"
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    model = load_adapter(load_base(found, "none", dtype), folder)  # type: ignore[arg-type]
    context = min(model.config.max_position_embeddings, FULL_CONTEXT)
    ends = end_token_ids(found, tokenizer)
    return Loaded(found, model, ChatFormat(tokenizer, date), ends, context)
