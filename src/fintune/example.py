"""Records that all stages share: a message, an example, a dropped row, an encoded conversation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

Role = Literal["system", "user", "assistant", "tool"]

IGNORE_INDEX = -100
"""Label of a token that is not trained; torch's cross_entropy default `ignore_index`."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        thought: what an assistant thinks before it answers, without the tags around it.
        tool_calls: an assistant's calls, as JSON text: a list as the chat templates take it.
        tools: functions on offer, as JSON text; of a conversation's first turn.
        trained: an assistant's text is trained.
    """

    role: Role
    content: str
    thought: str = ""
    tool_calls: str = ""
    tools: str = ""
    trained: bool = True

    @property
    def record(self) -> dict[str, Any]:
        """As a file holds it: role, content, and what is said of the others."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value != field.default}

    def changed(self, change: Callable[[str], str], *names: str) -> Self:
        """The turn with `change` of each named text in its place."""
        texts: Any = {name: change(getattr(self, name)) for name in names}
        return replace(self, **texts)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """A turn from its record; what is absent or null is empty."""
        return cls(**{name: value for name, value in record.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Example:
    """A row that was not dropped: where it came from, and its messages.

    `line` is 1-based in its file. `row_sha256` hashes the raw row's canonical JSON (or, for
    a line that was no JSON, its bytes). `document` is what it names as its document (context_id).
    """

    source: str
    line: int
    row_sha256: str
    messages: tuple[Message, ...]
    document: str = ""

    @property
    def example_id(self) -> str:
        """Stable name of the row: the first 16 hex digits of its content's hash."""
        return self.row_sha256[:16]

    @property
    def place(self) -> str:
        """Where the row came from, as `source:line`."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Dropped:
    """A dropped row, with its one reason."""

    source: str
    line: int
    row_sha256: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation and its labels (`IGNORE_INDEX` where not trained)."""

    input_ids: list[int]
    labels: list[int]


def named_document(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> str:
    """The document that a row of data or of a task names, the same for all tasks, or ""."""
    named = row.get((columns or {}).get("context_id", "context_id"))
    text = "" if named is None or named != named else str(named).strip()
    return text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
