"""A config to edit, every key with its default and its meaning: `fintune init`."""

import json
import re
import shlex
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fintune import console, sample
from fintune.config import Config, load_config, local_id
from fintune.data.filters import not_english
from fintune.data.schema import FORMATS, TURNS, Rejected, to_messages
from fintune.data.split import share_of_test
from fintune.errors import ConfigError, OutputError
from fintune.evals.grading import HeldOutItems
from fintune.evals.verdict import FEWEST_CHECKABLE
from fintune.files import reaching, write_text
from fintune.formats import Unreadable, format_of, parse
from fintune.page import render
from fintune.sources import HUB_ID, find_sources, rows_on_disk

COMMENT_COLUMN = 44
HEAD = 100
"""Rows of a source that are looked at."""
MANY = 0.2
"""Share of rows, of another language or too short for the preset, above which they are kept."""
ANY_LANGUAGE = "data.filter_english_only=false"
SMALL, MULTILINGUAL = "smollm2-135m", "qwen3-0.6b"
"""Presets that are proposed: the smallest, and the smallest of many languages."""
CP1252 = {"encoding": "cp1252"}
NAMES = (
    r"quest|query|prompt|instruct|frage|user|customer|kunde|client|pregunta",
    r"answ|repl|respon|complet|antwort|agent|assistant|label|output|l(ö|oe)sung|solution|r[ée]ponse|respuesta",
)
"""Words in the name of a column of questions, and of one of answers."""


def init(
    out: Path,
    *,
    given: str | None,
    name: str | None,
    source: str | None,
    base: str | None,
    force: bool,
) -> None:
    """Write a commented config, with what a look at the source's first rows proposes.

    Args:
        given: the shipped config to start from; None: the one that suits the rows.
        name: name of the run, and of its folder under runs/.
        source: file, folder, glob or hub id of the rows.
        base: hub id of the base, or a folder or GGUF file that holds one.
        force: overwrite `out`.

    Raises:
        ConfigError: no such preset, no such base, or a value that its key does not take.
        DataError: no such source, or one that cannot be read.
        OutputError: `out` exists, or cannot be written.
    """
    if out.exists() and not force:
        raise OutputError(f"{out} exists already", fix="give another --out, or --force")
    preset = given or SMALL
    config = load_config(preset, _overrides(name, source, base))
    proposed = _look(config) if source else []
    if source and not given and not base:
        if ANY_LANGUAGE in proposed:
            preset = MULTILINGUAL
            console.say(f"preset {preset}: the base of {SMALL} learnt English alone")
        else:
            proposed += sample.local_base()  # the same, where it lies on this machine
    config = load_config(preset, [*_overrides(name, source, base), *proposed])
    lines = _lines(config, Config())
    with reaching(out):
        write_text(out, render("config.yaml.jinja", preset=preset, out=out, lines=lines))
    where = "" if config.model.path else " of the hub"
    plain = [each for each in proposed if not each.startswith("data.source")]
    about = ", ".join([f"base {config.model.id}{where}", *plain])
    next_command = console.repeating("fintune prepare")
    console.result(f"wrote {out} ({about}); next: {next_command} --config {shlex.quote(str(out))}")


def _look(config: Config) -> list[str]:
    """What the first rows of a source on this machine propose, as overrides; says what is there."""
    path, count = config.data.source, rows_on_disk(config.data)
    if count is None and HUB_ID.fullmatch(path) and not format_of(path):
        console.warn(f"nothing lies at {path}: it is taken for a data set of the hub")
        return []
    found = find_sources(config.data, {})
    head = [parse(raw) for _, raw in islice(chain.from_iterable(s.rows() for s in found), HEAD)]
    if any(isinstance(row, Unreadable) and row.reason == "not_utf8" for row in head):
        again = config.model_copy(update={"data": config.data.model_copy(update=CP1252)})
        return ["data.encoding=cp1252", *_look(again)] if config.data.encoding == "utf-8" else []
    rows = [row for row in head if isinstance(row, dict)]
    columns = _columns(rows)
    named = json.dumps([{"path": path, "columns": columns}], ensure_ascii=False)
    proposed = [f"data.sources={named}"] * bool(columns)
    asked = []
    for row in rows:
        with suppress(Rejected):
            asked.append([turn.record for turn in to_messages(row, columns)])
    texts = [(turns[-2]["content"], turns[-1]["content"]) for turns in asked if len(turns) > 1]
    foreign = sum(not_english([user], [said], config.data) is not None for user, said in texts)
    if foreign > len(texts) * MANY:
        proposed.append(ANY_LANGUAGE)
    # Words are fewer than tokens, so that rows at the limit are rather kept.
    short = sum(len(f"{user} {said}".split()) < config.data.min_tokens for user, said in texts)
    proposed += ["data.min_tokens=1"] * (short > len(texts) * MANY)
    reader = HeldOutItems({"messages": turns} for turns in asked)
    row = {"example_id": "", "source": "", "group": ""}
    kinds = [reader.item({**row, "messages": turns}).kind for turns in asked]
    share = config.data.test_share or share_of_test(count or 0)
    checkable = sum(kind != "text" for kind in kinds) / max(1, len(head)) * (count or 0) * share
    said = f"{path}: {count} rows; of the first {len(head)}, {len(asked)} are read"
    said += ", questions in {user}, answers in {assistant}".format(**columns) if columns else ""
    needed = f"about {checkable:.0f} checkable questions, {FEWEST_CHECKABLE} make a verdict"
    console.say(f"{said}; {needed}")
    return [*proposed, 'data.source=""'] if columns else proposed


def _columns(rows: list[Any]) -> dict[str, str] | None:
    """The columns of question and answer by their names, where no known format has them."""
    known = {name for form in FORMATS for name in (*form[0], form[1])}.union(TURNS)
    if not rows or known & rows[0].keys():
        return None
    asked, said = (
        next((name for name in rows[0] if re.search(words, name.lower())), None) for words in NAMES
    )
    if asked is None or said is None or asked == said:
        names = ", ".join(rows[0])
        form = "[{path: ..., columns: {user: QUESTION, assistant: ANSWER}}]"
        console.warn(f"columns {names}: name question and answer: data.sources={form}")
        return None
    return {"user": asked, "assistant": said}


def _lines(values: BaseModel, defaults: BaseModel, indent: str = "") -> list[str]:
    """A line for every key with its meaning; those that hold their default are commented out."""
    lines, plain = [], values.model_dump(mode="json")
    plain |= values.model_dump(mode="json", exclude_defaults=True)  # no key of a source left unset
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
        there = Path(base).expanduser().exists()
        if not there and (not HUB_ID.fullmatch(base) or Path(base).parent.is_dir()):
            raise ConfigError(f"no base at {base}", fix="give a folder, a GGUF file or a hub id")
        chosen |= local if there else {"model.id": base}
        chosen["release.license"] = None  # a preset's is its own base's
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
