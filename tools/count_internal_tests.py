"""Share of tests that name an internal of the package.

    python tools/count_internal_tests.py [FOLDER]

Public are the names of `fintune.__all__`, the command line (`fintune.cli`), the config and the
errors (`fintune.config`, `fintune.errors`). A test names an internal if it, or a function of its
file that it calls or takes as a fixture, uses a name imported from another module of the package,
or a name of the package that begins with `_`. Prints a line per file, then the total.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {"fintune", "fintune.cli", "fintune.config", "fintune.errors"}


def internal_names(tree: ast.Module) -> set[str]:
    """Names that a file imports from modules of the package that are not public."""
    import fintune

    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fintune":
            module = str(node.module)
            for alias in node.names:
                public = module == "fintune" and alias.name in fintune.__all__
                public |= module in PUBLIC - {"fintune"} or f"{module}.{alias.name}" in PUBLIC
                if not public or alias.name.startswith("_"):
                    names.add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name
                for alias in node.names
                if alias.name.startswith("fintune.") and alias.name not in PUBLIC
            }
    return names


def count(path: Path) -> tuple[int, int]:
    """Tests of a file, and those that name an internal."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    internal = internal_names(tree)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def uses(name: str, seen: set[str]) -> bool:
        if name in seen or name not in functions:
            return False
        seen.add(name)
        node = functions[name]
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        used |= {argument.arg for argument in node.args.args}
        return bool(used & internal) or any(uses(each, seen) for each in used)

    tests = [name for name in functions if name.startswith("test_")]
    return len(tests), sum(uses(name, set()) for name in tests)


def main(folder: Path) -> None:
    """Print the table."""
    sys.path.insert(0, str(folder))
    found = {path.name: count(path) for path in sorted(folder.glob("test_*.py"))}
    for name, (tests, internal) in found.items():
        sys.stdout.write(f"{name:<34} {tests:>4} {internal:>4}\n")
    tests, internal = (sum(pair) for pair in zip(*found.values(), strict=True))
    sys.stdout.write(f"{'total':<34} {tests:>4} {internal:>4}  {internal / tests:.0%}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "tests")
