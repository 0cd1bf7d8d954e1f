"""The bundled tiny base model and sample rows: they make the first run work offline on a laptop.

Importing this package loads neither torch nor transformers. `python -m fintune.nano.build` makes
everything in it again.
"""

from pathlib import Path
from typing import Final

NANO_ID: Final = "fintune/nano"


def base_dir() -> Path:
    """Folder of the bundled base: a LlamaForCausalLM and its tokenizer, for `from_pretrained`."""
    return Path(__file__).parent / "base"


def rows_path() -> Path:
    """The sample rows, JSON Lines with the columns `system`, `user` and `assistant`."""
    return Path(__file__).parent / "rows.jsonl"
