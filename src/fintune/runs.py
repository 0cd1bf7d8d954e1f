"""Runs side by side: `fintune runs`, `fintune show` and `fintune compare`; loads no torch."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from fintune import console, seal
from fintune.config import load_config
from fintune.errors import FintuneError, OutputError, failing
from fintune.evals import compare as comparison
from fintune.evals import results
from fintune.evals.grading import PHRASES
from fintune.files import reaching, read_json
from fintune.page import render, save_page

Json = dict[str, Any]
HOME = Path("runs")
"""Where runs lie unless a config says otherwise."""
FIELDS = ("name", "date", "base", "rows", "learning_rate", "loss", "verdict", "state")
DOING = {"data": "preparing", "run": "training", "eval": "evaluating", "release": "releasing"}
ADAPTER = "best/adapter_model.safetensors"
SUMS = "SHA256SUMS"
"""Written last into a release."""
TAIL = 4096
"""Bytes of the end of metrics.jsonl that are read; a line is 250."""
UNLIKE = (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""What reading files raises that are damaged, or of another version."""


def list_runs(folder: Path) -> list[Json]:
    """FIELDS of each folder in one, the newest first; None is what is not known.

    Only small files are read, and none is believed: what is damaged is a row whose `state` says so.

    Raises:
        OutputError: the folder cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError as error:
        what = f"{folder} cannot be read: {error.strerror}"
        raise OutputError(what, fix="name the folder of your runs: fintune runs DIR") from None
    rows = []
    for root in found:
        rows.append(dict.fromkeys(FIELDS) | {"name": root.name})
        try:
            rows[-1] |= _facts(root)
        except (FintuneError, *UNLIKE) as error:
            reason = str(error).splitlines() or [type(error).__name__]
            rows[-1]["state"] = f"damaged, or of others: {reason[0][:200].replace(f'{root}/', '')}"
    return sorted(rows, key=lambda row: row["date"] or "", reverse=True)


def _facts(root: Path) -> Json:
    run, tested = _mark(root / "run"), _mark(root / "eval")
    config = load_config(root / "run" / "config.yaml") if run else None
    data = config.data_dir if config and config.data.out else root / "data"
    made, marks = _mark(data), [*root.glob("*/done.json"), *root.glob("*/inputs.json")]
    parts = {name: fact["sha256"] for name, fact in made.get("files", {}).items()}
    same = _done(made) and (not run or run["inputs"]["data"].items() <= parts.items())
    trained = run["files"][ADAPTER]["sha256"] if _done(run) else None
    current = _done(tested) and (not run or tested["inputs"]["adapter"] == trained)
    found = read_json(results.latest(root / "eval") / results.RESULTS) if current else {}
    known = current and found["loss"] is not None  # a server may give none
    loss = float(found["loss"]["adapter"]) if known else None
    if not isfinite(loss or 0):
        raise ValueError("a loss that is no number")
    newest = max((path.stat().st_mtime for path in marks), default=0)
    return {
        "date": f"{datetime.fromtimestamp(newest, UTC):%Y-%m-%dT%H:%M:%SZ}" if marks else None,
        "base": config.model.id if config else str(tested["inputs"]["base"]) if tested else None,
        "rows": int(read_json(data / "manifest.json")["rows"]["train"]) if same else None,
        "learning_rate": config.train.learning_rate if config else None,
        "loss": loss,
        "verdict": str(found["verdict"]) if current else None,
        "state": _state(root, run, tested, current, _done(made)),
    }


def _mark(folder: Path) -> Json:
    """done.json of a folder, else inputs.json, else {}."""
    marks = [path for name in (seal.DONE, seal.INPUTS) if (path := folder / name).is_file()]
    return seal.read_checked(marks[0]) if marks else {}


def _done(mark: Json) -> bool:
    return "inputs_sha256" in mark


def _state(root: Path, run: Json, tested: Json, current: bool, prepared: bool) -> str:
    """What is being done, else how far the run came.

    Args:
        current: the evaluation is finished, and of the run's adapter.
    """
    locks = [name for name in DOING if (root / f".{name}.lock").is_file()]
    held = [DOING[name] for name in locks if seal.held(root / name)]
    if run and not _done(run):
        step, seals = _last_step(root / "run"), root.glob("run/checkpoints/*/done.json")
        saved = max((int(path.parent.name.rpartition("-")[2]) for path in seals), default=0)
        # A stop saves: steps behind the last checkpoint were lost by a failure or a kill.
        how = "failed" if step > saved or not saved else "stopped"
        return f"{held[0]}, step {step}" if held else f"{how} at step {step}, saved: {saved}"
    states: dict[str, object] = {
        "released": current and (root / "release" / SUMS).is_file(),
        "evaluated": current,
        "trained, eval unfinished": run and tested and not _done(tested),
        "trained again after eval": run and tested,
        "trained": run,
        "prepared": prepared,
        "prepared data": (root / "manifest.json").is_file(),
        "failed, nothing written": locks,
    }
    return [*held, *(state for state, true in states.items() if true), "not a run"][0]


def _last_step(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        *_, last, _ = (b"{}", *file.read(TAIL).split(b"\n"))
    return int(json.loads(last).get("step", 0))


def evaluation(run: str) -> Path:
    """The evaluation of a run: by the run's folder, its name below ./runs, or its own folder.

    Raises:
        OutputError: there is none.
    """
    roots = [Path(run), HOME / run]
    for folder in (path for root in roots for path in (root / "eval", root)):
        if (folder / "run.json").is_file():
            return folder
    fix = "give a run's folder or its name (fintune runs shows them); to make one: fintune eval"
    raise OutputError(f"no evaluation in {roots[0]} or {roots[1]}", fix=fix)


def show(run: str, line: Callable[[str], None]) -> Json:
    """Say the verdict of a finished evaluation again, by `line`; returns test_results.json.

    Raises:
        FintuneError: there is none, or it is unfinished, changed or of another version.
    """
    folder = evaluation(run)
    with failing(f"{folder} is not of this version", *UNLIKE, fix="fintune eval --fresh"):
        folder = results.latest(folder)
        results.read_evaluation(folder)
        return results.tell(folder, line)


def compare(first: str, second: str, page: Path | None) -> Json:
    """Compare the adapters of two runs (`evals.compare`).

    Args:
        page: an HTML file to write, with the questions that changed.

    Raises:
        FintuneError: as of `show`; other questions or prompts; or the page has no place.
    """
    marks = (seal.DONE, seal.INPUTS, SUMS)
    if page and (page.suffix != ".html" or any((page.parent / m).is_file() for m in marks)):
        what = f"{page} does not end in .html, or lies in the folder of a stage"
        raise OutputError(what, fix="name another: --html compare.html")
    with failing("these runs are not of this version", *UNLIKE, fix="fintune eval --fresh"):
        sides = [comparison.read_side(name, evaluation(name)) for name in (first, second)]
        found, pairs = comparison.compare(*sides)
    if page:
        with reaching(page, "name another: --html FILE"):
            save_page(page, "compare", found=found, pairs=pairs, phrases=PHRASES)
    return found


def text(name: str, values: Any) -> str:
    """What a command prints; a table has one line a row where the terminal is wide enough."""
    width = console.out.width if console.out.is_terminal else 10_000
    return render(f"{name}.txt.jinja", found=values, width=width).rstrip()
