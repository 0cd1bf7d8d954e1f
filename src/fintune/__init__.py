"""fintune: finance instruction data in, a LoRA adapter that can be trusted out.

The names below are the public interface; docs/python.md walks through them. Each is imported when
it is first used, so that `import fintune` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fintune.config import Config, load_config
    from fintune.data.prepare import prepare
    from fintune.errors import FintuneError
    from fintune.evals.evaluate import evaluate
    from fintune.evals.grading import Graded, grade
    from fintune.pipeline import release
    from fintune.releasing.verify import verify
    from fintune.training.run import train
    from fintune.untrusted.checks import Check, Report

__all__ = [
    "Check",
    "Config",
    "FintuneError",
    "Graded",
    "Report",
    "evaluate",
    "grade",
    "load_config",
    "prepare",
    "release",
    "train",
    "verify",
]
__version__ = "0.3.0"

_MODULES = {
    "fintune.config": ("Config", "load_config"),
    "fintune.data.prepare": ("prepare",),
    "fintune.errors": ("FintuneError",),
    "fintune.evals.evaluate": ("evaluate",),
    "fintune.evals.grading": ("Graded", "grade"),
    "fintune.pipeline": ("release",),
    "fintune.releasing.verify": ("verify",),
    "fintune.training.run": ("train",),
    "fintune.untrusted.checks": ("Check", "Report"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'fintune' has no attribute {name!r}")
