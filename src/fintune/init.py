"""A config to edit, every key with its default and its meaning: `fintune init`."""

import json
from pathlib import Path

from pydantic import BaseModel

from fintune import console
from fintune.config import Config, load_config, local_id
from fintune.errors import OutputError
from fintune.files import reaching, write_text
from fintune.page import render

COMMENT_COLUMN = 44


def init(
    out: Path, *, preset: str, name: str | None, source: str | None, base: str | None, force: bool
) -> None:
    """Write a commented config.

    Args:
        preset: the shipped config to start from.
        name: name of the run, and of its folder under runs/.
        source: file, folder, glob or hub id of the rows.
        base: hub id of the base, or a folder or GGUF file that holds one.
        force: overwrite `out`.

    Raises:
        ConfigError: no such preset, or a value that its key does not take.
        OutputError: `out` exists, or cannot be written.
    """
    if out.exists() and not force:
        raise OutputError(f"{out} exists already", fix="give another --out, or --force")
    lines = _lines(load_config(preset, _overrides(name, source, base)), Config())
    with reaching(out):
        write_text(out, render("config.yaml.jinja", preset=preset, out=out, lines=lines))
    console.result(f"wrote {out}; next: fintune run --config {out}")


def _lines(values: BaseModel, defaults: BaseModel, indent: str = "") -> list[str]:
    """A line for every key with its meaning; those that hold their default are commented out."""
    lines, plain = [], values.model_dump(mode="json")
    for name, field in type(values).model_fields.items():
        value, default = getattr(values, name), getattr(defaults, name)
        text = indent + ("# " if value == default else "") + f"{name}:"
        below = _lines(value, default, indent + "  ") if isinstance(value, BaseModel) else []
        if not below:
            text += " " + json.dumps(plain[name], ensure_ascii=False)  # YAML too, in one line
        about = " ".join(str(field.description).split())
        lines += [f"{text:<{COMMENT_COLUMN}} # {about}", *below]
    return lines


def _overrides(name: str | None, source: str | None, base: str | None) -> list[str]:
    chosen: dict[str, str | None] = {} if name is None else {"name": name, "out": f"runs/{name}"}
    if source is not None:
        # A preset may leave its rows unmasked, show them to a judge and publish them; what it knows
        # of them is not true of others.
        chosen |= {"data.source": source, "data.pii": "mask", "release.samples": "ids"}
        chosen |= dict.fromkeys(("eval.judge.model", "eval.judge.max_usd"))
    if base is not None:
        local = {"model.id": local_id(base), "model.path": base}
        chosen |= local if Path(base).expanduser().exists() else {"model.id": base}
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
