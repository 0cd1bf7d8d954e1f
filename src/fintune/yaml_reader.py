"""YAML of a config: scalars stay texts, and nothing that looks like a secret is quoted.

What a text means is decided when the type of its key is known: pydantic makes numbers and truth
values of it, and a name or a path is what is written (2024, 010, 1e10).
"""

import re
from typing import Any

import yaml

from fintune.errors import ConfigError

SECRETS = re.compile(
    r"""(?ix)(?<![a-z])(?:sk|pk|rk|hf|gh[opsu]|xox[abp]|glpat|AIza|AKIA|ASIA)[-_]?[A-Za-z0-9_-]{12,}
    | eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]+)? | bearer\s+[\w.~+/=-]{8,}
    | (?<=//)[^\s/@"]+:[^\s/@"]+(?=@)
    | (?:(?:api|access)[_-]?key|token|secret|passw(?:or)?d)
      \\?["']?\s*[:=]\s*\\?["']?[^\s"',}\\]{6,}"""
)
"""What looks like a key or a password: never stored, never shown."""
MOST_NODES = 5_000
"""Values of a YAML document. Every key with its default is 90."""


class _Loader(yaml.BaseLoader):
    """Scalars are texts, or None for a null without quotes; no aliases, no key twice."""

    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes += 1
        if self.check_event(yaml.AliasEvent) or self.nodes > MOST_NODES:
            raise yaml.YAMLError(f"an alias (*), or more than {MOST_NODES} values")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode) -> str | None:  # type: ignore[override]
        null = not node.style and node.value in ("", "~", "null", "Null", "NULL")
        return None if null else str(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        if twice := [key for at, key in enumerate(keys) if key in keys[:at]]:
            raise yaml.YAMLError(f"written twice: {twice[0]}")
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str | bytes, where: str) -> Any:
    """The document's value: dicts, lists, texts and None.

    Args:
        where: what is read, for the message.

    Raises:
        ConfigError: no YAML, an alias, a key that stands twice, or more than MOST_NODES values.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: "\U00110000"
        mark = getattr(error, "problem_mark", None)
        # Not the lines themselves, which str(error) quotes: a secret may stand in them.
        said = f"{getattr(error, 'problem', '')}, line {mark.line + 1}" if mark else str(error)
        raise ConfigError(redacted(f"{where} is not readable YAML: {said}")) from None


def redacted(text: str) -> str:
    """A text without what looks like a secret."""
    return SECRETS.sub("[redacted]", text)


def set_key(tree: dict[str, Any], override: str) -> None:
    """Apply `key.sub=value`. Raises ConfigError where it has another form."""
    key, equals, value = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"--set {redacted(override)}: not of the form key=value")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {redacted(key)}: {section} is a value, not a section")
    tree[last] = read_yaml(value, f"--set {key}: the value")
