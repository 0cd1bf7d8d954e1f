"""Count lines of code of the package: no blank line, comment or docstring.

    python tools/count_code_lines.py [FOLDER]

Prints code lines, files and the largest file of every folder of FOLDER (default: src/fintune),
then the totals. A line counts once if a token of code stands on it. A string that is a statement
of its own documents what it stands in or behind (a module, class, function, constant) and does not
count; every other string does, on each of its lines. Only `.py` files are read.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "fintune"
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Code lines of one module's source. Raises SyntaxError where it is no Python."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def count(package: Path = PACKAGE) -> dict[str, dict[str, int]]:
    """Code lines of every module, by folder and file name.

    Folders are relative to `package`; its own modules stand under `.`.
    """
    folders: dict[str, dict[str, int]] = {}
    for path in sorted(package.rglob("*.py")):
        folder = path.parent.relative_to(package).as_posix()
        lines = code_lines(path.read_text(encoding="utf-8"))
        folders.setdefault(folder, {})[path.name] = lines
    return folders


def main() -> None:
    """Print a row for every folder and one for all."""
    folders = count(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
    if not folders:
        sys.exit("no Python file there; name the folder of a package")
    wide = max(map(len, [*folders, "folder"]))
    table = [f"{'folder':{wide}}  code  files  largest file"]
    for folder, files in folders.items():
        name, most = max(files.items(), key=lambda file: file[1])
        table.append(f"{folder:{wide}} {sum(files.values()):5} {len(files):6}  {name} {most}")
    every = [lines for files in folders.values() for lines in files.values()]
    table.append(f"{'total':{wide}} {sum(every):5} {len(every):6}  {max(every)}")
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
