"""The bundled tiny base model and sample rows: they make the first run work offline on a laptop.

Importing this package loads neither torch nor transformers. `python tools/build_nano` makes
base and rows again.
"""

from pathlib import Path
from typing import Final

NANO_ID: Final = "fintune/nano"
DEMO_QUESTIONS: Final = (
    "Quillmere Foods has published its annual report for 2023. Revenue rose to $684 million in 2023"
    " from $517 million in 2022. Net income was $92 million in 2023, down from $118 million in"
    " 2022.\n\nWhat was the net income of Quillmere Foods in 2023?",
    "Shares of Tarnwick Steel tumbled 17% after the results. The company cut its full-year"
    " guidance.\n\nIs the tone of this news positive, negative or neutral?",
    "Please explain free cash flow in one or two sentences for someone new to finance.",
)
"""Asked of base and adapter at the end of the demo: a figure, a tone, an explanation."""


def base_dir() -> Path:
    """Folder of the bundled base: a LlamaForCausalLM and its tokenizer, for `from_pretrained`."""
    return Path(__file__).parent / "base"


def rows_path() -> Path:
    """The sample rows, JSON Lines with the columns `system`, `user` and `assistant`."""
    return Path(__file__).parent / "rows.jsonl"
