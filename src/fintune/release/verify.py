"""Any release folder, ours or not: does it hold what it says, and does it answer as trained?

First what the bytes say (`untrusted.static`), and nothing is loaded unless all of that passed.
Then, in a limited child, tokenizer, golden prompts, keys and shapes (`untrusted.probe`). Then the
adapter is loaded as the seed's usage snippet loads it, and the recorded greedy answers are held
against the weights.
"""

from collections.abc import Iterator
from pathlib import Path

from fintune.errors import FintuneError, ModelError, OutputError
from fintune.model import (
    Base,
    check_revision,
    inference_dtype,
    load_adapter,
    load_base,
    release_base,
)
from fintune.release.golden import check_answers, read_golden_prompts
from fintune.release.server_check import check_server
from fintune.untrusted import checks, static
from fintune.untrusted.checks import Check, Report
from fintune.untrusted.probe import probe_release, read_tokenizer


def verify(
    folder: Path, *, base: Path | None = None, no_pickle: bool = False, server: str | None = None
) -> Report:
    """Check a release folder, up to the first stage that fails.

    Args:
        folder: the release.
        base: folder of its base; absent: the bundled one, or the hub's by id and revision.
        no_pickle: also refuse `training_args.bin`, which is otherwise allowed by name and
            checksum and never opened.
        server: URL of a running OpenAI-compatible server that serves this release.

    Returns:
        Every check that ran; `Report.settle` raises GateRefused where one failed.

    Raises:
        OutputError: no such folder.
        GateRefused: the base is refused, or the release passed a limit of the child.
        ModelError: the base is not on this machine and cannot be fetched.
    """
    if not folder.is_dir():
        raise OutputError(f"no release folder at {folder}")
    report = Report(folder)
    report.run(lambda: static.static_checks(folder, "release", no_pickle=no_pickle))
    report.run(lambda: [static.check_paths(folder, [])])
    if report.failed:
        return report
    found = release_base(folder, base)
    report.run(lambda: check_revision(folder, found))
    report.run(lambda: probe_release(folder, found.folder))
    report.run(lambda: _check_loaded(folder, found))
    if server is not None:
        report.run(lambda: _check_server(folder, server))
    return report


def _check_loaded(folder: Path, base: Base) -> Iterator[Check]:
    dtype = inference_dtype()
    try:
        model = load_adapter(load_base(base, "none", dtype), folder)
    except FintuneError as error:
        yield Check("load", "failed", error.what)
        return
    yield Check("load", "ok", f"peft loads it on {base.id} ({dtype})")
    golden = read_golden_prompts(folder)
    if golden is not None:
        yield from check_answers(golden, model, dtype)


def _check_server(folder: Path, server: str) -> list[Check]:
    golden = read_golden_prompts(folder)
    if golden is None:
        raise ModelError(f"{folder} has no {checks.FIXTURE} to hold a server against")
    names = ["adapter", folder.resolve().name]
    return [*check_server(golden, read_tokenizer(folder), server, names)]
