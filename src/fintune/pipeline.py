"""What needs more than one stage: all of them in a row, and a release of recomputed results."""

from pathlib import Path

from fintune.config import Config
from fintune.data.prepare import prepare
from fintune.evals.evaluate import evaluate
from fintune.evals.results import check_results
from fintune.releasing import bundle
from fintune.seal import check_place
from fintune.training.run import train


def run(
    config: Config, *, fresh: bool = False, accept: str | None = None, judge_host: str = ""
) -> Path:
    """Prepare, train, evaluate, release; a finished stage is kept. Returns the release folder.

    Args: as of the stages; `fresh` moves each existing folder aside first.

    Raises:
        FintuneError: of the stage that failed; those before it are finished.
    """
    for folder in config.folders().values():
        check_place(folder)  # before hours of training, not after
    prepare(config, fresh=fresh)
    train(config, fresh=fresh)
    evaluate(config, fresh=fresh, judge_host=judge_host)
    return release(config, fresh=fresh, accept=accept)


def release(config: Config, *, fresh: bool = False, accept: str | None = None) -> Path:
    """The adapter with its card and proof, once the gate is passed. Returns the release folder.

    Args:
        fresh: move an existing release aside when the new one is complete.
        accept: release without the verdict `better`, for this reason, which the card states.

    Raises:
        GateRefused: the gate refuses, or the results are not those of the stored answers.
        OutputError: a stage before is unfinished or changed, or the folder is taken.
    """
    check_place(config.release_dir)
    check_results(config.eval_dir)
    return bundle.release(config, fresh=fresh, accept=accept)
