"""A config to edit, every key with its default and its meaning: `fintune init`."""

import json
import sys
from functools import partial
from pathlib import Path

import typer
from pydantic import BaseModel

from fintune import console
from fintune.config import Config, load_config, presets
from fintune.errors import ConfigError, OutputError
from fintune.files import reaching, write_text

COMMENT_COLUMN = 44
HEAD = """\
# Config of a run, with every key of fintune. A line that begins with # shows a default: take the #
# off, and that of its section, to change it. Made by `fintune init --preset {preset}`.
# Next: fintune prepare --config {out}, then inspect, then run.

"""


def init(
    out: Path, *, preset: str | None, name: str | None, source: str | None, base: str | None,
    force: bool = False,
) -> None:  # fmt: skip
    """Write a commented config; questions are asked on a terminal where no answer was given.

    Args:
        preset: the shipped config to start from.
        name: name of the run, and of its folder under runs/.
        source: file, folder, glob or hub id of the rows.
        base: hub id of the base, or a folder that holds one.
        force: overwrite `out`.

    Raises:
        ConfigError: an answer the config refuses, or no answers and nobody to ask.
        OutputError: `out` exists, or cannot be written.
    """
    if out.exists() and not force:
        raise OutputError(f"{out} exists already", fix="give another --out, or --force")
    if preset is name is source is base is None:
        if not sys.stdin.isatty():
            what = "init asks a few questions, and there is no terminal to ask on"
            raise ConfigError(what, fix="give options: fintune init --preset nano --source x.jsonl")
        ask = partial(typer.prompt, err=True, type=str)
        preset = ask(f"preset to start from ({', '.join(presets())})", "nano")
        known = load_config(preset)
        name = ask("name of the run", known.name)
        source = ask("rows: a file, folder, glob or hub id", known.data.source)
        base = ask("base: a hub id, or a folder", known.model.id)
    preset = preset or "nano"
    lines = _lines(load_config(preset, _overrides(name, source, base)), Config())
    with reaching(out):
        write_text(out, HEAD.format(preset=preset, out=out) + "\n".join(lines) + "\n")
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
    chosen = {} if name is None else {"name": name, "out": f"runs/{name}"}
    if source is not None:
        # A preset may pass its own rows unmasked; what it knows of them is not true of others.
        chosen |= {"data.source": source, "data.pii": "mask"}
    if base is not None:
        folder = Path(base).expanduser()
        local = {"model.id": f"local/{folder.resolve().name}", "model.path": base}
        chosen |= local if folder.is_dir() else {"model.id": base}
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
