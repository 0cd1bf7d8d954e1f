"""The public interface: its names, a cheap import, and the page that walks through it."""

import re
import subprocess
import sys
from pathlib import Path

import tiny
from tiny import ROOT

import fintune

PAGE = ROOT / "docs" / "python.md"


def test_every_public_name_exists_and_importing_is_cheap() -> None:
    for name in fintune.__all__:
        assert getattr(fintune, name).__module__.startswith("fintune."), name
    code = "import fintune, sys; assert 'prepare' in dir(fintune)\n"
    code += "print({'torch', 'transformers', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_stages_stay_functions_whatever_is_imported() -> None:
    """A package of the name of a function would take its place."""
    code = "import fintune.cli, fintune.pipeline, fintune\nfor n in fintune.__all__: print(n)\n"
    code += "assert all(callable(getattr(fintune, name)) for name in fintune.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_page_runs(tmp_path: Path) -> None:
    """On the tiny base in place of the demo's, with two steps: the path is the same."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    words = tiny.chain(tmp_path / "run")[3::2]
    program = "\n".join(blocks).replace(
        'load_config("demo", ["out=runs/python"])', f"load_config({str(tiny.config())!r}, {words})"
    )
    assert str(tiny.config()) in program
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "('answers', 'ok')" in done.stdout and "correct 5.2" in done.stdout
