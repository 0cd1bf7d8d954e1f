"""Commands that only look (at rows, runs, known bases, this machine), and the exports."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import fintune
from fintune import console
from fintune.files import read_json

CONFIG = "fintune.yaml"
"""The config where no --config is given; `fintune init` writes it."""

looks = typer.Typer()

ConfigName = Annotated[str, typer.Option("--config", "-c", help="A YAML file, or a preset's name.")]
Set = typer.Option("--set", "-s", help="Override a key: --set train.learning_rate=2e-4.")
Overrides = Annotated[list[str] | None, Set]
SourceName = Annotated[str | None, typer.Option(help="Only rows of this source.")]
LineNumber = Annotated[int | None, typer.Option(min=1, help="Only the row of this line.")]
Count = Annotated[int, typer.Option(min=1, help="Rows to show.")]
Runs = Annotated[Path, typer.Argument(help="The folder that the runs are in.")]
Page = Annotated[Path | None, typer.Option(help="A page to write: the questions that changed.")]
Run = Annotated[str, typer.Argument(help="A run's folder, or its name below ./runs.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


@looks.command()
def inspect(
    config: ConfigName = CONFIG,
    overrides: Overrides = None,
    row: Annotated[str, typer.Option(help="An example id, or the start of one.")] = "",
    part: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="Where to look.")
    ] = "train",
    count: Count = 1,
    source: SourceName = None,
    line: LineNumber = None,
) -> None:
    """A row as the model sees it, trained tokens in green; by --line also a dropped one."""
    loaded = fintune.load_config(config, overrides)
    from fintune.data import inspect as shown

    texts, dropped_rows = shown.inspect(loaded, row, part, count, source, line)
    for text in texts:
        console.out.print(text)
    if dropped_rows:
        _show_dropped(dropped_rows)


@looks.command()
def dropped(
    config: ConfigName = CONFIG,
    overrides: Overrides = None,
    reason: Annotated[str | None, typer.Option(help="Only this reason.")] = None,
    count: Count = 20,
    source: SourceName = None,
    line: LineNumber = None,
) -> None:
    """Which rows were dropped, where and why: the ledger of `prepare`."""
    loaded = fintune.load_config(config, overrides)
    from fintune.data.inspect import why_dropped

    rows = why_dropped(loaded, source=source, reason=reason, line=line)
    if reason and not rows:
        console.result(f"no row was dropped for the reason {reason}")
        return
    _show_dropped(rows, count)


@looks.command("runs")
def list_runs(folder: Runs = Path("runs"), as_json: Json = False) -> None:
    """Every run with its base, rows, rate, loss, verdict and state, newest first."""
    from fintune import runs

    rows = runs.list_runs(folder)
    console.emit(rows, as_json, runs.text("runs", rows))


@looks.command()
def show(run: Run, as_json: Json = False) -> None:
    """The verdict of a finished evaluation again, with accuracy and loss."""
    from fintune import runs

    console.emit(runs.show(run, console.say if as_json else console.result), as_json)


@looks.command()
def compare(a: Run, b: Run, html: Page = None, as_json: Json = False) -> None:
    """The adapter of run B against that of run A, paired over the same test questions."""
    from fintune import runs

    found = runs.compare(a, b, html)
    console.emit(found, as_json, runs.text("compare", found))


@looks.command()
def bases(as_json: Json = False) -> None:
    """Which bases were tried, by which transformers, and what each falls back to."""
    known = read_json(Path(__file__).with_name("bases.json"))
    console.emit(known, as_json)
    if not as_json:
        for row in known["bases"]:
            console.result("{id:41} {architecture:30} {result}".format(**row))
        console.say("transformers {transformers}, peft {peft}. {how}".format(**known))


tasks = typer.Typer(help="The public finance tasks, and how lm-eval is given them.")
looks.add_typer(tasks, name="tasks", invoke_without_command=True)


@tasks.callback()
def list_tasks(context: typer.Context, as_json: Json = False) -> None:
    """The public finance tasks: what is asked, where the questions come from, their licence."""
    if context.invoked_subcommand:
        return
    from fintune.evals.tasks import TASKS

    rows = [{"name": name, **task._asdict()} for name, task in TASKS.items()]
    rows = [{key: value for key, value in row.items() if key != "read"} for row in rows]
    console.emit(rows, as_json)
    if not as_json:
        for row in rows:
            console.result("{name:14} {kind:17} {source}; {licence}".format(**row).rstrip("; "))


@tasks.command("export")
def export_tasks(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    config: Annotated[str, typer.Option("--config", "-c")] = "smollm2-135m",
    overrides: Annotated[list[str] | None, typer.Option("--set", "-s")] = None,
) -> None:
    """Write eval.suite and eval.tasks for lm-evaluation-harness, graded as here."""
    import fintune
    from fintune.evals.lm_eval import export

    names = export(fintune.load_config(config, overrides), folder)
    console.say(f"lm_eval --include_path {folder} --tasks {','.join(names)} --apply_chat_template")
    console.result("\n".join(names))


@looks.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, and what is missing; exit 1 when something essential is."""
    from fintune.doctor import examine

    findings = examine()
    console.emit(findings, as_json)
    if not as_json:
        for row in findings:
            line = f"{row['status']:8} {row['name']:17} {row['value']}  {row['advice']}"
            console.result(line.rstrip())
    if any(finding["status"] == "missing" for finding in findings):
        raise typer.Exit(1)


def _show_dropped(entries: list[dict[str, Any]], count: int = 20) -> None:
    columns = ["source", "line", "reason", "detail"]
    cells = ([entry[column] for column in columns] for entry in entries[:count])
    rest = f", the first {count} (more: --count)" if len(entries) > count else ""
    console.table(f"dropped rows: {len(entries)}{rest}", columns, cells)
    from fintune.data.filters import MEANINGS

    for reason in sorted({entry["reason"] for entry in entries[:count]}):
        console.say(f"{reason}: {MEANINGS.get(reason, 'not known to this version')}")


class _ExportGroup(TyperGroup):
    """Subcommands of `export`, which are loaded when one is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return self._loaded().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._loaded().get_command(ctx, cmd_name)

    def _loaded(self) -> TyperGroup:
        from fintune.releasing.export import exports

        return typer.main.get_group(exports)


export = typer.Typer(
    cls=_ExportGroup,
    no_args_is_help=True,
    result_callback=lambda value: console.result(str(value)),
)
