"""Where the judgings of an evaluation lie, by the judge that a config names."""

import re
from pathlib import Path

from fintune.config import Config
from fintune.files import sha256_json
from fintune.seal import JUDGINGS

RUBRIC = Path(__file__).with_name("rubric.md").read_text("utf-8")
"""What the judge is told; another one makes another judging."""


def results_dir(config: Config) -> Path:
    """Folder of the results: of the judging by the configured judge, else the evaluation's."""
    judge = config.eval.judge
    if judge.model is None:
        return config.eval_dir
    name = re.sub(r"[^\w.-]+", "-", judge.model)[:60]
    asked = sha256_json([judge.model, judge.base_url, RUBRIC])[:8]
    return config.eval_dir / JUDGINGS / f"{name}-{asked}"


def prepared(config: Config) -> Path | None:
    """Folder of the prepared data; None where there is none, as for an adapter of others."""
    given = config.data.out is not None or config.data_dir.is_dir()
    return config.data_dir if given else None


def looks_dir(config: Config) -> Path:
    """Where the looks at these questions are counted: in the prepared data, else beside the run, so
    that other adapters' evaluations that lie beside it count too."""
    return prepared(config) or config.out.parent
