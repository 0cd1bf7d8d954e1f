"""The command line: one short function a command.

Stages are imported inside, so that --help is instant, and after the config is read: an error in it
is said before torch is loaded.
"""

import json
import os
import shlex
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import fintune
from fintune import __version__, console, kept, sample
from fintune.cli_looks import CONFIG, ConfigName, Overrides, export, looks
from fintune.errors import FintuneError, OutputError, Stopped, UsageError, needing
from fintune.files import read_json
from fintune.stop import STOP

app = typer.Typer(
    name="fintune",
    help="Finance instruction data in, a LoRA adapter that can be trusted out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(looks)

Data = Annotated[
    Path | None, typer.Option("--data", help="A folder of prepared data, or a run that has one.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an existing folder aside first.")]
Accept = Annotated[str | None, typer.Option(help="Release without `better`, for this reason.")]
JudgeHost = Annotated[str, typer.Option(help="A host that may get the judge's key.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Release = Annotated[Path, typer.Argument(help="A release folder, or hub id (also ID@REVISION).")]
MaybeConfig = Annotated[
    str | None, typer.Option("--config", "-c", help="A YAML file, or a preset's name.")
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="An adapter of another trainer: peft's folder.")
]
AnyBase = Annotated[
    str | None, typer.Option("--base", help="Its base: an id, folder or GGUF file.")
]
BaseFolder = Annotated[
    Path | None,
    typer.Option(help="Its base, a folder or GGUF file; else the one it was trained on."),
]

WRITERS = ("demo", "run", "prepare", "train", "eval", "release", "judge", "export")
"""Commands that write a folder, which a signal must not leave half-written."""
OFFLINE = "--offline"
DEMO_RELEASE = Path("runs/demo/release")


def main() -> None:
    """Entry point: a FintuneError becomes one message and its exit code."""
    words = sys.argv[1:]
    console.GIVEN[:] = _config_words(words)
    sys.argv[1:] = sorted(words, key=lambda word: word != OFFLINE)  # it may stand anywhere
    console.PROGRAM[:] = _program()
    again = f"continue with: {' '.join(console.PROGRAM)} "
    last_words = f"stopped before anything was written; {again}{shlex.join(words)}\n"
    try:
        with STOP.listening(last_words.encode(errors="backslashreplace")):
            _quiet()
            app()
    except FintuneError as error:
        stopped = isinstance(error, Stopped) and STOP.asked
        (console.say if stopped else console.fail)(str(error))
        if isinstance(error, Stopped):
            # An old folder is moved aside once; an old release when the new one is complete.
            without = [word for word in words if word != "--fresh" or words[0] == "release"]
            console.say(again + shlex.join(without))
        sys.exit(error.exit_code)


def _program() -> list[str]:
    """The words that this program was called by: a module of a Python, a path, or just its name."""
    name, found = sys.argv[0], shutil.which("fintune")
    if Path(name).name == "__main__.py":
        return [shlex.quote(sys.orig_argv[0]), "-m", "fintune"]
    return ["fintune"] if found == name else [shlex.quote(name)]


def _config_words(words: list[str]) -> list[str]:
    """The options of a command line that name its config and override keys, for hints."""
    names = ("--config", "-c", "--set", "-s")
    pairs = zip(["", *words], words, strict=False)
    return [shlex.quote(w) for before, w in pairs if before in names or w.split("=")[0] in names]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version and exit.")
    ] = False,
    offline: Annotated[
        bool,
        typer.Option(OFFLINE, help="Open no connection, but to a judge on this machine."),
    ] = False,
) -> None:
    if offline:  # read by huggingface_hub at its import, by wandb, and by the judge
        os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "FINTUNE_OFFLINE": "1"}
    if version:
        console.result(__version__)
        raise typer.Exit
    if context.invoked_subcommand not in WRITERS:
        STOP.release()  # a reader has nothing to continue, and uvicorn has a handler


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Root folder of the run.")] = Path("runs/demo"),
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """The whole path on SmolLM2-135M-Instruct and made-up rows, on a laptop, in minutes."""
    given = [f"out={json.dumps(str(out))}", *sample.local_base(), *(overrides or [])]
    config = fintune.load_config("demo", given)
    if config.model.path is None:
        console.say(f"the base comes from the hub; without one: {sample.INSTALL}")
    from fintune.demo import show

    _all_stages(config, fresh=fresh)
    show(config)


@app.command()
def run(
    config: ConfigName = CONFIG,
    overrides: Overrides = None,
    data: Data = None,
    fresh: Fresh = False,
    accept: Accept = None,
    judge_host: JudgeHost = "",
) -> None:
    """All stages of a config: prepare, train, eval, release. Finished ones are kept."""
    loaded = _load(config, overrides, data)
    _all_stages(loaded, fresh=fresh, accept=accept, judge_host=judge_host)


@app.command()
def prepare(
    config: ConfigName = CONFIG,
    overrides: Overrides = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Raw rows -> train, validation and test rows, with a ledger of every dropped row."""
    loaded = fintune.load_config(config, overrides)
    kept.once(lambda: fintune.prepare(loaded, fresh=fresh), loaded, "data", fresh=fresh)
    from fintune.evals import outlook

    outlook.tell(outlook.outlook(loaded))
    console.emit(read_json(loaded.data_dir / "manifest.json"), as_json)


@app.command()
def train(
    config: ConfigName = CONFIG,
    overrides: Overrides = None,
    data: Data = None,
    fresh: Fresh = False,
    force_resume: Annotated[
        str | None, typer.Option(help="Continue although config, data or versions changed: why.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prepared rows -> the best adapter. The same command continues a stopped or killed run."""
    loaded = _load(config, overrides, data)
    work = lambda: fintune.train(loaded, fresh=fresh, force_resume=force_resume)  # noqa: E731
    kept.once(work, loaded, "train", fresh=fresh or force_resume is not None)
    console.emit({"run": str(loaded.run_dir)}, as_json)


@app.command()
def plan(config: ConfigName = CONFIG, overrides: Overrides = None, as_json: Json = False) -> None:
    """What `train` would do, what it takes and where it fits; loads no weights, needs no GPU."""
    loaded = fintune.load_config(config, overrides)
    from fintune import plan as planning

    planned = planning.plan(loaded)
    console.emit(planned, as_json)
    if not as_json:
        planning.show(planned)


@app.command("eval")
def evaluate(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    data: Data = None,
    fresh: Fresh = False,
    rescore: Annotated[Path | None, typer.Option(help="Grade this folder's answers again.")] = None,
    judge_host: JudgeHost = "",
    final: Annotated[bool, typer.Option("--final", help="Open the part kept back: once.")] = False,
    again: Annotated[str, typer.Option(help="Why --final opens it again; kept.")] = "",
    adapter: Adapter = None,
    merged: Annotated[
        Path | None, typer.Option("--model", help="A merged model's folder, held against --base.")
    ] = None,
    base: AnyBase = None,
    train_rows: Annotated[
        Path | None, typer.Option(help="Rows that it was trained on: not asked again.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="Ask also a form that is served: merged, merged:fp16, 4bit, gguf:FILE."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Base against adapter on held-out rows: the verdict is a paired interval."""
    given: dict[str, Any] = {"fresh": fresh and form is None, "judge_host": judge_host}
    of_others, other = _of_others(adapter, merged, base, train_rows), None
    if form:
        from fintune.evals.forms import Form, answer_as

        if rescore or final or (merged and form.startswith("merged")):
            raise UsageError("--form is asked of an adapter, and not with --rescore or --final")
        Form.of(form)  # not after hours of answers
    if rescore:
        from fintune.evals.results import rescore as make_again

        results = make_again(rescore)
    elif of_others:
        from fintune import others

        loaded = others.load(config, _overrides(overrides, data), of_others, base)
        other = others.opened(of_others, bool(merged), train_rows)
        results = fintune.evaluate(loaded, **given, final=final, again=again, other=other)
    else:
        loaded = _load(config or CONFIG, overrides, data)
        if final:
            results = fintune.evaluate(loaded, **given, final=final, again=again)
        else:
            kept.once(lambda: fintune.evaluate(loaded, **given), loaded, "eval", **given)
            from fintune.evals.endpoint import shown_dir

            results = read_json(shown_dir(loaded, judge_host) / "test_results.json")
    if form:
        results = answer_as(loaded, form, other=other, fresh=fresh)
    console.emit(results, as_json)


@app.command()
def release(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    data: Data = None,
    fresh: Fresh = False,
    accept: Accept = None,
    adapter: Adapter = None,
    base: AnyBase = None,
) -> None:
    """The adapter with its proof: card, golden prompts, checksums; needs a passing gate."""
    given: dict[str, Any] = {"fresh": fresh, "accept": accept}
    if folder := _of_others(adapter, None, base, None):
        from fintune import others

        loaded = others.load(config, _overrides(overrides, data), folder, base)
        fintune.release(loaded, **given, adapter=folder)
    else:
        loaded = _load(config or CONFIG, overrides, data)
        kept.once(lambda: fintune.release(loaded, **given), loaded, "release", **given)


@app.command()
def judge(
    config: ConfigName = CONFIG,
    overrides: Overrides = None,
    judge_host: JudgeHost = "",
    labels: Annotated[
        Path | None, typer.Option(help="Human verdicts, JSON Lines of id and verdict.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask the judge about a finished evaluation's answers. Calls already paid are not repeated."""
    loaded = fintune.load_config(config, overrides)
    from fintune.evals.judging import judge_answers

    console.emit(judge_answers(loaded, judge_host=judge_host, labels=labels), as_json)


@app.command()
def verify(
    folder: Release,
    base: BaseFolder = None,
    no_pickle: Annotated[bool, typer.Option("--no-pickle", help="No pickle either.")] = False,
    server: Annotated[
        str | None, typer.Option(help="Hold a running OpenAI-compatible server against it.")
    ] = None,
    require: Annotated[
        Literal["better"] | None, typer.Option(help="Exit 3 unless this is its verdict.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Is this release what it says? Checksums, contents, loading, prompts, answers; exit 0 or 3."""
    from fintune.releasing.server_check import ReleaseServer

    try:
        if server is not None:
            ReleaseServer(server, folder)  # before 10 s of imports; `verify` asks it again
        _check_release(folder)
        report = fintune.verify(
            folder, base=base, no_pickle=no_pickle, server=server, require=require
        )
    except FintuneError as error:
        console.emit([{"name": "folder", "status": "failed", "detail": error.what}], as_json)
        raise
    console.emit([asdict(check) for check in report.checks], as_json)
    if not as_json:
        rows = [(check.name, check.status, check.detail) for check in report.checks]
        refused = [check for check in report.failed if check.name not in ("server", "verdict")]
        said = "refused" if refused else "verified"
        console.table(f"{folder}: {said}", ["check", "", "detail"], rows)
    report.settle()


app.add_typer(export, name="export", help="A verified release in another form.")


@app.command()
def chat(folder: Release = DEMO_RELEASE, base: BaseFolder = None) -> None:
    """Talk to a release in the terminal, base and adapter in turn."""
    _check_release(folder)
    from fintune.serve.repl import chat as talk

    talk(folder, base=base)


@app.command()
def serve(
    folder: Release = DEMO_RELEASE,
    base: BaseFolder = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind.")] = 8000,
) -> None:
    """A page that compares base and adapter, and an OpenAI-compatible server; loopback only."""
    from fintune.serve import check_port

    _check_release(folder)
    check_port(host, port)
    with needing("serve", "serving"):
        from fintune.serve.app import serve as run_server
    run_server(folder, base=base, host=host, port=port)


@app.command()
def init(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path(CONFIG),
    preset: Annotated[
        str | None, typer.Option(help="The preset to start from; else one that suits the rows.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    source: Annotated[str | None, typer.Option(help="Rows: file, folder, glob or hub id.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base: a hub id, a folder, or a GGUF file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented config to edit. Never over a file."""
    from fintune.init import init as write

    write(out, given=preset, name=name, source=source, base=base, force=force)


@app.command("help")
def show_help(verb: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """What a command does and takes: `fintune help train`."""
    sys.argv[1:] = [*(verb or []), "--help"]
    app()


def _check_release(folder: Path) -> None:
    """Refuse what is no release before torch is loaded.

    Raises:
        OutputError: it is neither a folder nor a hub id, or a run whose release lies inside.
    """
    inside = folder / "release"
    if (inside / "adapter_config.json").is_file():
        raise OutputError(f"{folder} is no release", fix=f"did you mean {inside}?")
    if not folder.exists() and len(folder.parts) != 2 and "@" not in folder.as_posix():
        raise OutputError(f"no release folder at {folder}")


def _all_stages(config: fintune.Config, **given: Any) -> None:
    def work() -> None:
        from fintune.pipeline import run as all_stages

        all_stages(config, **given)

    kept.once(work, config, *kept.STAGES, **given)


def _load(config: str, overrides: list[str] | None, data: Path | None) -> fintune.Config:
    """The config, with the prepared data of --data."""
    return fintune.load_config(config, _overrides(overrides, data))


def _overrides(overrides: list[str] | None, data: Path | None) -> list[str]:
    """Those of --set, and that of --data, which may be a run that holds it."""
    given = list(overrides or ())
    if data is not None:
        inner = data / "data"
        given.append(f"data.out={json.dumps(str(inner if inner.is_dir() else data))}")
    return given


def _of_others(
    adapter: Path | None, merged: Path | None, base: str | None, train_rows: Path | None
) -> Path | None:
    """The folder of --adapter or --model, if one is given.

    Raises:
        UsageError: both are, or an option that belongs to them stands alone.
    """
    if adapter and merged:
        raise UsageError("--adapter and --model: one is judged at a time")
    if not adapter and not merged and (base or train_rows):
        what = "--base and --train-rows belong to --adapter or --model"
        raise UsageError(what, fix="of a run of ours: --set model.id=... or model.path=...")
    return adapter or merged


def _quiet() -> None:
    """Keep notices of libraries about themselves out of our output; warnings of ours stay."""
    # Read by transformers and huggingface_hub at import; a setting of the user wins.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # A release names its base's public id; loading it onto a local folder is what we mean to do.
    warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")
