"""fintune: finance instruction data in, a LoRA adapter that can be trusted out.

The names below are the public interface; docs/python.md walks through them. Each is imported when
it is first used, so that `import fintune` loads neither torch nor transformers.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fintune.config import Config as Config
    from fintune.config import load_config as load_config
    from fintune.data.prepare import prepare as prepare
    from fintune.errors import FintuneError as FintuneError
    from fintune.evals.evaluate import evaluate as evaluate
    from fintune.evals.grading import Graded as Graded
    from fintune.evals.grading import grade as grade
    from fintune.pipeline import release as release
    from fintune.releasing.verify import verify as verify
    from fintune.training.train import train as train
    from fintune.untrusted.checks import Check as Check
    from fintune.untrusted.checks import Report as Report

_MODULES = {
    "Check": "fintune.untrusted.checks",
    "Config": "fintune.config",
    "FintuneError": "fintune.errors",
    "Graded": "fintune.evals.grading",
    "Report": "fintune.untrusted.checks",
    "evaluate": "fintune.evals.evaluate",
    "grade": "fintune.evals.grading",
    "load_config": "fintune.config",
    "prepare": "fintune.data.prepare",
    "release": "fintune.pipeline",
    "train": "fintune.training.train",
    "verify": "fintune.releasing.verify",
}
__all__ = [*_MODULES]
__version__ = "0.3.0"

# At each import it tells of a kernel that a CPU lacks, and nothing here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'fintune' has no attribute {name!r}")
