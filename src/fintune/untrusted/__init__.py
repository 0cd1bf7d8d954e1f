"""Folders made by others: everything that is read from a release, an adapter or a base.

`open_folder` is the one entrance. First the static checks (`static`), which import neither torch
nor transformers; then, in one forked child with limits (`child`), what only transformers and peft
can say (`probe`). What passes may be loaded by path; SECURITY.md says what that promises.
"""

from pathlib import Path

from fintune.untrusted.checks import Check, Report
from fintune.untrusted.static import Role, static_checks

__all__ = ["Check", "Report", "Role", "open_folder", "static_checks"]


def open_folder(folder: Path, role: Role) -> list[Check]:
    """Check a folder's bytes; what transformers and peft say of it is asked by `probe`.

    Raises:
        GateRefused: a static check failed; the message names it.
    """
    report = Report(folder)
    report.run(lambda: static_checks(folder, role))
    report.settle()
    return report.checks
