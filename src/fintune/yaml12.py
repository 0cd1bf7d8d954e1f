"""YAML with the scalars of version 1.2, read within bounds.

PyYAML reads 1.1, in which 010 is 8, 1:30 is 90, `on` is a truth value and 1e-4 a text. Here a
scalar without quotes stays text until the type of its key is known (`resolved`): a name or a path
is what is written, anything else is what the core schema says.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

MOST_CHARACTERS, MOST_NODES, MOST_DEPTH = 2**20, 5_000, 16
"""Of a YAML document. Every key with its default is 90 values on 4 levels; 5,000 take 0.3 s."""
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str")}
NULL = frozenset({"", "~", "null", "Null", "NULL"})
CORE: dict[str, Callable[[str], Any]] = {
    "true|True|TRUE": lambda text: True,
    "false|False|FALSE": lambda text: False,
    "[-+]?[0-9]{1,99}": int,
    "0o[0-7]{1,99}": lambda text: int(text, 8),
    "0x[0-9a-fA-F]{1,99}": lambda text: int(text, 16),
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?": float,
    r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)": lambda text: float(text.replace(".", "")),
}
"""YAML 1.2's core schema (10.3.2) but null: the form of a plain scalar, and what reads it."""


class Plain(str):
    """A scalar that stands in YAML without quotes: its text, until the key's type is known."""


class _Loader(yaml.BaseLoader):
    """YAML within bounds that are kept while it is read, before a value is made."""

    nodes = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*): write the value out")
        if self.depth > MOST_DEPTH or self.nodes > MOST_NODES:
            raise yaml.YAMLError(f"more than {MOST_NODES} values, or {MOST_DEPTH} levels of them")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node and node.tag not in _TAGS:
            raise yaml.YAMLError(f"the tag {node.tag}: values are told apart by their keys' types")
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        return str(node.value) if node.style else Plain(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = Counter(str(key.value) for key, _ in node.value)
            raise yaml.YAMLError(f"written twice: {max(keys, key=lambda key: keys[key])}")
        return {str(key): value for key, value in mapping.items()}


def read_yaml(text: str) -> Any:
    """The value of a YAML document; scalars without quotes are `Plain`.

    Raises:
        yaml.YAMLError: no YAML, too large or deep, an alias, a tag, or a key written twice.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"longer than {MOST_CHARACTERS} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except ValueError as error:  # PyYAML on "\U00110000"
        raise yaml.YAMLError(str(error)) from None


def resolved(value: Any, *, text: bool) -> Any:
    """A value whose plain scalars are read by the core schema, or, with `text`, left as text."""
    if isinstance(value, dict):
        return {key: resolved(part, text=text) for key, part in value.items()}
    if isinstance(value, list):
        return [resolved(part, text=text) for part in value]
    if not isinstance(value, Plain):
        return value
    if value in NULL:
        return None
    if not text:
        for pattern, read in CORE.items():
            if re.fullmatch(pattern, value):
                return read(value)
    return str(value)


def problem_of(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the lines themselves: a secret may stand in them."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}"
    return str(error)
