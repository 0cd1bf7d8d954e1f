"""Adapters of other trainers: their config, from the options of a command, and training rows."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fintune.config import Config, ModelConfig, SourceConfig, load_config
from fintune.data.schema import Rejected, to_messages
from fintune.errors import DataError, ModelError, OutputError
from fintune.evals.subject import Other
from fintune.example import Example, Message
from fintune.formats import parse
from fintune.sources import HUB_ID, named
from fintune.untrusted import checks


def load(name: str | None, overrides: Iterable[str], folder: Path, base: str | None) -> Config:
    """The config for an adapter of another trainer, or a merged model.

    Args:
        name: a preset or YAML file; None: the defaults, with `runs/NAME OF THE FOLDER` as `out`.
        folder: of peft, or of the merged model.
        base: a hub id, folder or GGUF file; None: the config's, else what the adapter names.

    Raises:
        ConfigError: as of `load_config`. OutputError: no such folder. ModelError: no base is known.
    """
    if not folder.is_dir():
        raise OutputError(f"no folder at {folder}", fix="name the folder that peft saved")
    given = []
    if name is None:
        own = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-_.") or "adapter"
        given = [f"name={json.dumps(own)}", f"out={json.dumps(f'runs/{own}')}"]
    config = load_config(name, [*given, *overrides])
    stated = checks.read_object(folder, checks.ADAPTER_CONFIG, absent=True)
    return config.model_copy(update={"model": _base(config.model, stated, folder, base)})


def _base(
    config: ModelConfig, stated: dict[str, Any], folder: Path, base: str | None
) -> ModelConfig:
    """Which base it is.

    Args:
        stated: adapter_config.json. base: of the command line.
    """
    if base is None and config.id:
        return config
    named, revision = (str(stated.get(k) or "") for k in ("base_model_name_or_path", "revision"))
    wanted = base or named
    if not wanted:
        what = f"{folder} does not name its base"
        raise ModelError(what, fix="name it: --base ID, a folder, or FILE.gguf")
    place, known = Path(wanted).expanduser(), bool(HUB_ID.fullmatch(named))
    tree: dict[str, Any] = {"quantization": config.quantization}
    if place.exists():
        tree |= {"path": place, "id": named if known and not Path(named).exists() else ""}
    elif HUB_ID.fullmatch(wanted):
        tree |= {"id": wanted, "revision": revision or None if wanted == named else None}
    else:
        what = f"its base {wanted} is neither here nor the id of one"
        raise ModelError(what, fix="name it: --base ID, a folder, or FILE.gguf")
    return ModelConfig.model_validate(tree)


def opened(folder: Path, merged: bool, train_rows: Path | None) -> Other:
    """What is judged, with the rows of --train-rows. Raises DataError: as `training_rows`."""
    return Other(folder, merged, *(training_rows(train_rows) if train_rows else ((), ())))


def training_rows(path: Path) -> tuple[tuple[Example, ...], tuple[tuple[str, str], ...]]:
    """The rows of a file, folder or glob, and name and sha256 of each file.

    A row of no known format counts as one text: all of its cells.

    Raises:
        DataError: there is no such file, or no row with a text in it.
    """
    sources, found = named([SourceConfig(path=str(path))], "--train-rows", {}), list[Example]()
    for source in sources:
        for line, given in source.rows():
            row, messages = parse(given), tuple[Message, ...]()
            with suppress(Rejected, RecursionError):
                messages = to_messages(row, None)
            if not messages and isinstance(row, dict):
                texts = [cell for cell in row.values() if isinstance(cell, str)]
                messages = (Message("user", "\n".join(texts)),) if texts else ()
            found += [Example(source.name, line, "", messages)] if messages else []
    if not found:
        fix = "give the rows that it was trained on, as prepare reads them"
        raise DataError(f"{path} holds no row with a text", fix=fix)
    return tuple(found), tuple((source.name, source.identity) for source in sources)
