"""Made-up rows, so that the first run needs no data of anyone's.

Companies, figures and news in them were put together by `python tools/sample_rows`; nothing in them
is true. Importing this package loads neither torch nor transformers.
"""

from pathlib import Path
from typing import Final

SAMPLE: Final = "fintune/made-up-rows"
"""The `data.source` that means them."""


def control_path() -> Path:
    """Results of `tools/control.py`: in the installed package, or beside `src` in a checkout."""
    inside = Path(__file__).parent / "control.json"
    return inside if inside.is_file() else Path(__file__).parents[3] / "bench/results/control.json"


def rows_path() -> Path:
    """JSON Lines with the columns `system`, `user` and `assistant`, or `messages`."""
    return Path(__file__).parent / "made_up_rows.jsonl"
