"""The command line: one short function a verb. Stages are imported inside, so --help is instant."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fintune import __version__, console
from fintune.errors import FintuneError

if TYPE_CHECKING:
    from fintune.config import Config

app = typer.Typer(
    name="fintune",
    help="Finance instruction data in, a LoRA adapter that can be trusted out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ConfigName = Annotated[
    str, typer.Option("--config", "-c", help="A YAML file, or the name of a preset.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a key: --set train.learning_rate=2e-4."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an existing folder aside first.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]

DEFAULT = "fintune.yaml"
"""Config file that every verb looks for first; `fintune init` writes it."""


def main() -> None:
    """Entry point: a FintuneError becomes one message and its exit code, nothing else is caught."""
    _quiet()
    try:
        app()
    except FintuneError as error:
        console.fail(str(error))
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        console.result(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Root folder of the run.")] = Path("runs/demo"),
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """The whole path on the bundled nano base and sample rows, offline, in minutes."""
    from fintune.demo import show

    config = _load("nano", [f"out={out}", *(overrides or [])])
    _run(config, fresh=fresh, accept=None)
    show(config)


@app.command()
def run(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    accept: Annotated[
        str | None, typer.Option(help="Release without the verdict `better`, for this reason.")
    ] = None,
) -> None:
    """All stages of a config: prepare, train, eval, release. Finished ones are kept."""
    _run(_load(config, overrides), fresh=fresh, accept=accept)


@app.command()
def prepare(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Raw rows -> train and validation rows, with a ledger of every dropped row."""
    from fintune.data.prepare import prepare as stage

    manifest = stage(_load(config, overrides), fresh=fresh)
    if as_json:
        console.emit_json(manifest)


@app.command()
def train(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; load no weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prepared rows -> the best adapter. The same command continues a stopped or killed run."""
    from fintune.train import run as stage

    loaded = _load(config, overrides)
    if dry_run:
        plan = stage.dry_run(loaded)
        if as_json:
            console.emit_json(plan)
        else:
            _show_dry_run(plan)
        return
    folder = stage.train(loaded, fresh=fresh)
    if as_json:
        console.emit_json({"run": str(folder)})


@app.command("eval")
def evaluate(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    rescore: Annotated[
        Path | None, typer.Option(help="Rebuild the results of this folder, without any call.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Base against adapter on held-out rows: the verdict is a paired interval."""
    from fintune.evals import evaluate as stage

    results = (
        stage.rescore(rescore) if rescore else stage.evaluate(_load(config, overrides), fresh=fresh)
    )
    if as_json:
        console.emit_json(results)


@app.command()
def release(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    accept: Annotated[
        str | None, typer.Option(help="Release without the verdict `better`, for this reason.")
    ] = None,
) -> None:
    """The adapter with its proof: card, prompt fixture, checksums. Refused without a passing gate."""
    from fintune.release.bundle import release as stage

    stage(_load(config, overrides), fresh=fresh, accept=accept)


def _run(config: "Config", *, fresh: bool, accept: str | None) -> None:
    from fintune.data.prepare import prepare as prepare_stage
    from fintune.evals.evaluate import evaluate as evaluate_stage
    from fintune.release.bundle import release as release_stage
    from fintune.train.run import train as train_stage

    prepare_stage(config, fresh=fresh)
    train_stage(config, fresh=fresh)
    evaluate_stage(config, fresh=fresh)
    release_stage(config, fresh=fresh, accept=accept)


def _load(name: str, overrides: list[str] | None) -> "Config":
    from fintune.config import load_config

    return load_config(name, overrides or [])


def _show_dry_run(plan: dict[str, Any]) -> None:
    rows = [(key, value) for key, value in plan["batches"].items()]
    console.table("batches", ["what", "value"], rows)
    console.table("lora_config", ["key", "value"], plan["lora_config"].items())
    console.table("training_arguments", ["key", "value"], plan["training_arguments"].items())
    for note in plan["notes"]:
        console.warn(note)


def _quiet() -> None:
    """Keep notices of libraries about themselves out of our output; warnings of ours stay."""
    import logging
    import os

    # Read by transformers and datasets at import; a user's own setting wins.
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
