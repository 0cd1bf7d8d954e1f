"""The shipped configs that `--config` finds by name."""

from pathlib import Path


def preset_dir() -> Path:
    """Folder of the shipped presets: in the installed package, or beside `src` in a checkout."""
    inside = Path(__file__).parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "presets"


def presets() -> list[str]:
    """Names that `--config` finds without a path."""
    return sorted(path.stem for path in preset_dir().glob("*.yaml"))
