"""Commands of several stages: all of them in order, and `release`, which checks `eval` first."""

from pathlib import Path

from fintune.config import Config, JudgeConfig
from fintune.data.filters import MEANINGS
from fintune.data.prepare import prepare
from fintune.evals.endpoint import shown_dir
from fintune.evals.evaluate import check_tasks, evaluate
from fintune.evals.grading import PHRASES
from fintune.evals.outlook import outlook, tell
from fintune.evals.results import REPORT, RESULTS, RUN, check_results
from fintune.evals.verdict import summary
from fintune.files import read_json
from fintune.judgings import results_dir
from fintune.page import render
from fintune.releasing import bundle
from fintune.seal import check_place
from fintune.training.metrics import check_trackers
from fintune.training.train import train


def run(
    config: Config, *, fresh: bool = False, accept: str | None = None, judge_host: str = ""
) -> Path:
    """Prepare, train, evaluate, release; a finished stage is kept. Returns the release folder.

    Args:
        fresh: move the existing folder of every stage aside first.
        accept: as of `release`.
        judge_host: another host that may get the judge's key.

    Raises:
        FintuneError: of the stage that failed; those before it are finished.
    """
    for folder in config.folders().values():
        check_place(folder)  # before hours of training, not after
    check_trackers(config)
    check_tasks(config, fresh=fresh)
    prepare(config, fresh=fresh)
    tell(outlook(config))
    train(config, fresh=fresh)
    evaluate(config, fresh=fresh, judge_host=judge_host)
    return release(config, fresh=fresh, accept=accept)


def release(
    config: Config,
    *,
    fresh: bool = False,
    accept: str | None = None,
    adapter: Path | None = None,
) -> Path:
    """Compute the results again, then build the release (`bundle.release`).

    Args:
        fresh: move an existing release aside when the new one is complete.
        accept: release without the verdict `better`, for this reason, which the card states.
        adapter: peft's folder of another trainer, in place of the run's; it was evaluated.

    Returns:
        The release folder.

    Raises:
        GateRefused: the gate refuses, or the results are not those of the stored answers.
        OutputError: an earlier stage is unfinished or changed, or the folder holds other files.
    """
    if shown_dir(config) == config.eval_dir:  # no judging, and no key for one
        judging = config.eval.model_copy(update={"judge": JudgeConfig()})
        config = config.model_copy(update={"eval": judging})
    check_results(results_dir(config))
    told = bundle.Told(MEANINGS, _report(config))
    return bundle.release(config, fresh=fresh, accept=accept, told=told, adapter=adapter)


def _report(config: Config) -> str:
    """report.html as the release may hold it: with its questions where samples are text."""
    if config.release.samples == "text":
        return (results_dir(config) / REPORT).read_text(encoding="utf-8")
    results = read_json(results_dir(config) / RESULTS)
    shown = {"sentences": summary(results), "phrases": PHRASES, "groups": {}, "verdicts": []}
    head = read_json(config.eval_dir / RUN).get("run")
    return render("eval_report.html.jinja", results=results, head=head, **shown)
