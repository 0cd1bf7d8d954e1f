"""A judging of a finished evaluation: a folder with a seal of its own, `judgings/NAME` in it.

Another judge (model, endpoint or rubric) is another judging; all are kept and counted in
`evaluations.jsonl`. No judging changes a file of the evaluation. Its folder holds the calls, the
raw file, `run.json` (whom was asked, how many looks that makes), and the results with its verdicts.
"""

from pathlib import Path
from typing import Any

from fintune import seal
from fintune.config import Config
from fintune.console import say
from fintune.errors import ConfigError
from fintune.evals import history, judge, results
from fintune.evals.grading import Pair, load_pairs
from fintune.files import read_json, sha256_bytes, write_json, write_jsonl
from fintune.judgings import RUBRIC, looks_dir, results_dir


def judge_answers(
    config: Config, *, judge_host: str = "", labels: Path | None = None
) -> dict[str, Any]:
    """Ask the configured judge about the answers of a finished evaluation.

    Args:
        judge_host: another host that may get the judge's key (see `judge.api_key`).
        labels: human verdicts to compare the judge's with (see `judge.raw_rows`).

    Returns:
        The content of the judging's test_results.json.

    Raises:
        ConfigError: no judge is configured. DataError: `labels` is no such file.
        OutputError: the evaluation is unfinished. GateRefused: the judge's budget is spent.
    """
    results.read_evaluation(config.eval_dir)
    if config.eval.judge.model is None:
        raise ConfigError("no judge is configured", fix="--set eval.judge.model=MODEL")
    with seal.lock(config.eval_dir):
        ask(config, judge_host, labels)
    return results.tell(results_dir(config))


def ask(config: Config, judge_host: str, labels: Path | None = None) -> None:
    """Make the judging, or keep a finished one. The evaluation's lock is held."""
    folder, settings = results_dir(config), config.eval.judge
    tested = results.read_evaluation(config.eval_dir)
    asked = {"model": settings.model, "base_url": settings.base_url}
    asked["rubric_sha256"] = sha256_bytes(RUBRIC.encode())
    inputs = {"answers": tested["files"][results.ANSWERS]["sha256"], "judge": asked}
    if seal.finished(folder, inputs, command=results.COMMAND) and labels is None:
        say(f"{folder}: unchanged, kept")
        return
    seal.start(folder, inputs)
    pairs = judged_set(config.eval_dir)
    planned = judge.plan(pairs, settings, config.seed)
    done = judge.ask(folder, planned, settings, judge_host)
    rows = judge.raw_rows(pairs, planned, done, settings.model, labels)
    (folder / seal.DONE).unlink(missing_ok=True)
    write_jsonl(folder / judge.NAME, rows)
    looks = history.looks(looks_dir(config), tested["inputs"], inputs)
    write_json(folder / results.RUN, {"judge": asked, "looks": looks})
    verdict = results.write_results(folder)["verdict"]
    seal.seal(folder, inputs)
    history.note(looks_dir(config), tested["inputs"], verdict, inputs)


def judged_set(folder: Path) -> list[Pair]:
    """The items of an evaluation's judged set, by hash, with the answers of base and adapter."""
    pairs = {pair.item.id: pair for pair in load_pairs(folder)}
    return [pairs[key] for key in read_json(folder / results.RUN)["judged"]]
