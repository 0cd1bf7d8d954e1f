"""The command line: one short function a verb. Stages are imported inside, so --help is instant."""

import errno
import json
import os
import shlex
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from fintune import __version__, console
from fintune.errors import ConfigError, FintuneError, NoSpace, OutputError, Stopped
from fintune.files import FULL, reaching
from fintune.stop import STOP

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
Accept = Annotated[
    str | None, typer.Option(help="Release without the verdict `better`, for this reason.")
]
JudgeHost = Annotated[
    str, typer.Option(help="A host that may get the judge's key, besides its variable's own.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]

SourceName = Annotated[str | None, typer.Option(help="Only rows of this source.")]
LineNumber = Annotated[int | None, typer.Option(min=1, help="Only the row of this line.")]
BaseFolder = Annotated[
    Path | None, typer.Option(help="Folder of the base; absent: the bundled one or the hub's.")
]

WRITERS = ("demo", "run", "prepare", "eval", "release", "judge", "export")
"""Verbs that write a folder and know nothing of other processes, as `train` does."""
DEFAULT = "fintune.yaml"
"""Config file that every verb looks for first; `fintune init` writes it."""


def main() -> None:
    """Entry point: a FintuneError, or a full disk, becomes one message and its exit code."""
    again = shlex.join(["fintune", *sys.argv[1:]])
    try:
        with STOP.listening(f"stopped before anything was written; continue with: {again}\n"):
            _quiet()
            app()
    except FintuneError as error:
        console.fail(str(error))
        if isinstance(error, Stopped):
            console.say(f"continue with: {_without_fresh(sys.argv[1:])}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in FULL:
            raise
        what = "no room left where the results are written"
        console.fail(str(NoSpace(what, fix="make room; the same command begins again")))
        sys.exit(NoSpace.exit_code)


def _without_fresh(words: list[str]) -> str:
    """The command that continues this one: what --fresh moves aside is moved once, but a release,
    which is moved when the new one is complete."""
    kept = [word for word in words if word != "--fresh" or words[0] == "release"]
    return shlex.join(["fintune", *kept])


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        console.result(__version__)
        raise typer.Exit
    verb = context.invoked_subcommand
    if verb not in (*WRITERS, "train"):
        STOP.release()  # a reader has nothing to continue, and a server stops in its own way
    if os.environ.get("WORLD_SIZE", "1") in ("", "-1"):  # how some launchers say: not distributed
        for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(variable, None)
    if verb in WRITERS and os.environ.get("WORLD_SIZE", "1") not in ("0", "1"):
        raise ConfigError(
            f"fintune {verb} is for one process, and WORLD_SIZE says that several were launched",
            why="each would write the same folders",
            fix="launch `fintune train` alone so; run the other stages before and after it",
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Root folder of the run.")] = Path("runs/demo"),
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """The whole path on the bundled nano base and sample rows, offline, in minutes."""
    from fintune.demo import show
    from fintune.pipeline import run as all_stages

    config = _load("nano", [f"out={json.dumps(str(out))}", *(overrides or [])])
    all_stages(config, fresh=fresh)
    show(config)


@app.command()
def run(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    accept: Accept = None,
    judge_host: JudgeHost = "",
) -> None:
    """All stages of a config: prepare, train, eval, release. Finished ones are kept."""
    from fintune.pipeline import run as all_stages

    all_stages(_load(config, overrides), fresh=fresh, accept=accept, judge_host=judge_host)


@app.command()
def prepare(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Raw rows -> train, validation and test rows, with a ledger of every dropped row."""
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
    force_resume: Annotated[
        str | None,
        typer.Option(help="Continue although config, data or versions changed, for this reason."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prepared rows -> the best adapter. The same command continues a stopped or killed run."""
    loaded = _load(config, overrides)
    if dry_run:
        from fintune import plan as planned

        found = planned.dry_run(loaded)
        if as_json:
            console.emit_json(found)
        else:
            for part in ("training_arguments", "lora_config"):
                console.table(part, ["key", "value"], found[part].items())
            planned.show(found)
        return
    from fintune.training.run import train as stage

    folder = stage(loaded, fresh=fresh, force_resume=force_resume)
    if as_json:
        console.emit_json({"run": str(folder)})


@app.command()
def plan(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Training rows, instead of the prepared ones.")
    ] = None,
    mean_tokens: Annotated[
        int | None, typer.Option(min=16, help="Their mean length, instead of the prepared rows'.")
    ] = None,
    rate: Annotated[
        list[str] | None, typer.Option(help="Price of an hour in USD: --rate L4=0.80")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a run takes and where it fits: memory, time, price; loads no weights, needs no GPU."""
    from fintune import plan as planned

    loaded = _load(config, overrides)
    rates = planned.read_rates(rate or [])
    found = planned.plan(loaded, row_count=rows, mean_tokens=mean_tokens, rates=rates)
    if as_json:
        console.emit_json(found)
    else:
        planned.show(found)


@app.command("eval")
def evaluate(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    rescore: Annotated[
        Path | None, typer.Option(help="Rebuild the results of this folder, without any call.")
    ] = None,
    judge_host: JudgeHost = "",
    as_json: Json = False,
) -> None:
    """Base against adapter on held-out rows: the verdict is a paired interval."""
    if rescore:
        from fintune.evals.results import rescore as make_again
        from fintune.seal import lock

        if not rescore.is_dir():
            raise OutputError(f"no evaluation folder at {rescore}")
        with lock(rescore):
            results = make_again(rescore)
    else:
        from fintune.evals import evaluate as stage

        loaded = _load(config, overrides)
        results = stage.evaluate(loaded, fresh=fresh, judge_host=judge_host)
    if as_json:
        console.emit_json(results)


@app.command()
def release(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    fresh: Fresh = False,
    accept: Accept = None,
) -> None:
    """The adapter with its proof: card, golden prompts, checksums; needs a passing gate."""
    from fintune.pipeline import release as stage

    stage(_load(config, overrides), fresh=fresh, accept=accept)


@app.command()
def inspect(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    row: Annotated[str | None, typer.Option(help="An example id, or the start of one.")] = None,
    part: Annotated[
        Literal["train", "validation", "test"] | None, typer.Option(help="Absent: train.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Rows to show; absent: 1.")] = None,
    source: SourceName = None,
    line: LineNumber = None,
) -> None:
    """A row as the model sees it, trained tokens in green; by --line also a dropped one."""
    from fintune.data import inspect as shown

    loaded = _load(config, overrides)
    if line is not None:
        if row or part or count:
            raise ConfigError(
                "--line names one row: --row, --part and --count mean nothing with it"
            )
        kept, out = shown.find(loaded, line, source)
    else:
        kept = shown.inspect(loaded, row or "", part or "train", count or 1, source)
        out = []
    for found in kept:
        console.out.print(found)
    if out:
        _show_dropped(out)


@app.command()
def dropped(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    reason: Annotated[str | None, typer.Option(help="Only this reason.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 20,
    source: SourceName = None,
    line: LineNumber = None,
) -> None:
    """Which rows were dropped, where and why: the ledger of `prepare`."""
    from fintune.data.inspect import why_dropped

    found = why_dropped(_load(config, overrides), source=source, reason=reason, line=line)
    _show_dropped(found, count)


@app.command()
def judge(
    config: ConfigName = DEFAULT,
    overrides: Overrides = None,
    max_usd: Annotated[
        float | None, typer.Option(help="Stop before the call that may pass this sum.")
    ] = None,
    judge_host: JudgeHost = "",
    labels: Annotated[
        Path | None, typer.Option(help="Human verdicts, JSON Lines of id and verdict.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask the judge about a finished evaluation's answers. Calls already paid are not repeated."""
    from fintune.evals.evaluate import judge_answers

    budget = [] if max_usd is None else [f"eval.judge.max_usd={max_usd}"]
    loaded = _load(config, [*(overrides or []), *budget])
    results = judge_answers(loaded, judge_host=judge_host, labels=labels)
    if as_json:
        console.emit_json(results)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A release folder, ours or not.")],
    base: BaseFolder = None,
    no_pickle: Annotated[
        bool, typer.Option("--no-pickle", help="Refuse training_args.bin too.")
    ] = False,
    server: Annotated[
        str | None, typer.Option(help="Hold a running OpenAI-compatible server against it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Is this release what it says? Checksums, contents, loading, prompts, answers; exit 0 or 3."""
    from fintune.releasing.verify import verify as stage

    try:
        report = stage(folder, base=base, no_pickle=no_pickle, server=server)
    except FintuneError as error:
        if as_json:
            console.emit_json([{"name": "folder", "status": "failed", "detail": error.what}])
        raise
    if as_json:
        console.emit_json([asdict(check) for check in report.checks])
    else:
        rows = [(check.name, check.status, check.detail) for check in report.checks]
        refused = [check for check in report.failed if check.name != "server"]
        said = "refused" if refused else "verified"
        console.table(f"{folder}: {said}", ["check", "", "detail"], rows)
    report.settle()


class _ExportGroup(TyperGroup):
    """Subcommands of `export`, which are loaded when one is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return self._loaded().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._loaded().get_command(ctx, cmd_name)

    def _loaded(self) -> TyperGroup:
        from fintune.releasing.export import exports

        return typer.main.get_group(exports)


app.add_typer(
    typer.Typer(
        cls=_ExportGroup,
        no_args_is_help=True,
        result_callback=lambda value: console.result(str(value)),
    ),
    name="export",
    help="A verified release in another form.",
)


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A release folder.")] = Path("runs/demo/release"),
    base: BaseFolder = None,
) -> None:
    """Talk to a release in the terminal, base and adapter in turn."""
    from fintune.serve.repl import chat as talk

    talk(folder, base=base)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="A release folder.")] = Path("runs/demo/release"),
    base: BaseFolder = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind.")] = 8000,
) -> None:
    """A page that compares base and adapter, and an OpenAI-compatible server; loopback only."""
    try:
        from fintune.serve.app import serve as run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs {error.name}, which is not installed",
            fix="pip install 'fintune[serve]'",
        ) from None
    run_server(folder, base=base, host=host, port=port)


@app.command()
def init(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path(DEFAULT),
    preset: Annotated[str | None, typer.Option(help="The preset to start from.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Rows: a file, folder, glob or hub id.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base: a hub id, or a folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented config to edit; asks where no option is given. Never over a file."""
    from fintune.init import init as write

    _folder(out.parent)
    write(out, preset=preset, name=name, source=source, base=base, force=force)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, and what is missing; exit 1 when something essential is."""
    from fintune.doctor import examine, show

    findings = examine()
    if as_json:
        console.emit_json([asdict(finding) for finding in findings])
    else:
        show(findings)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _show_dropped(entries: list[dict[str, Any]], count: int = 20) -> None:
    columns = ["source", "line", "reason", "detail"]
    cells = ([entry[column] for column in columns] for entry in entries[:count])
    console.table(f"dropped rows: {len(entries)}", columns, cells)


def _load(name: str, overrides: list[str] | None) -> "Config":
    from fintune.config import load_config

    config = load_config(name, overrides or [])
    for folder in config.folders().values():
        _folder(folder)
    return config


def _folder(path: Path) -> Path:
    """A path that is a folder or can become one.

    Raises:
        OutputError: it is a file or below one, or its name is impossible.
    """
    with reaching(path):
        for part in (path, *path.parents):
            if part.exists() and not part.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{part} is a file")
    return path


def _quiet() -> None:
    """Keep notices of libraries about themselves out of our output; warnings of ours stay."""
    import logging

    # Read by transformers and datasets at import; a user's own setting wins.
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # A release names its base's public id; loading it onto a local folder is what we mean to do.
    warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")
