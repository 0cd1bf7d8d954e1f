"""A config to edit, every key with its default and its meaning: `fintune init`."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import BaseModel

from fintune import console
from fintune.config import Config, dump_yaml, load_config, preset_dir, presets
from fintune.errors import ConfigError, OutputError
from fintune.files import write_text

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
        OutputError: `out` exists.
    """
    if out.exists() and not force:
        raise OutputError(f"{out} exists already", fix="give another --out, or --force")
    if preset is name is source is base is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                "init asks a few questions, and there is no terminal to ask on",
                fix="answer with options: fintune init --preset nano --source rows.jsonl",
            )
        ask = partial(typer.prompt, err=True, type=str)
        preset = ask(f"preset to start from ({', '.join(presets())})", "nano")
        known = load_config(preset)
        name = ask("name of the run", known.name)
        source = ask("rows: a file, folder, glob or hub id", known.data.source)
        base = ask("base: a hub id, or a folder", known.model.id)
    preset = preset or "nano"
    config = load_config(preset, _overrides(name, source, base))
    spelled = yaml.safe_load((preset_dir() / f"{preset}.yaml").read_text(encoding="utf-8"))
    values, defaults = (yaml.safe_load(dump_yaml(tree)) for tree in (config, Config()))
    lines = [line for line, _ in _section(Config, values, defaults, spelled)]
    write_text(out, HEAD.format(preset=preset, out=out) + "\n".join(lines) + "\n")
    console.result(f"wrote {out}; next: fintune run --config {out}")


def _section(
    kind: type[BaseModel], values: Any, defaults: Any, spelled: Any, indent: str = ""
) -> list[tuple[str, bool]]:
    """Lines of a section with every key and its meaning, each with whether it is in force: what the
    preset spells or is no default; the others are commented out."""
    lines: list[tuple[str, bool]] = []
    for name, field in kind.model_fields.items():
        value, default, own = values[name], defaults[name], (spelled or {}).get(name)
        inner, below = field.annotation, list[tuple[str, bool]]()
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            below = _section(inner, value, default, own, indent + "  ")
            text, active = f"{name}:", any(active for _, active in below)
        else:
            shown = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
            text = f"{name}: {shown.removesuffix('...' + chr(10)).strip()}"
            active = own is not None or value != default
        text = indent + ("" if active else "# ") + text
        lines += [(f"{text:<{COMMENT_COLUMN}} # {field.description}", active), *below]
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
