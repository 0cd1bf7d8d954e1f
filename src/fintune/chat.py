"""Messages <-> tokens and labels: the only user of a chat template.

Ids and labels grow together. A conversation is cut into *runs* of text: what the model reads
(not trained) and, for every assistant turn, its text with the end-of-turn token (trained). Runs
are tokenised apart, exactly as a server does it: the prompt alone, then the answer token by token.

The template is rendered once per conversation shape (the order of roles) with placeholders for
the texts, so that a text which spells a control token (`<|eot_id|>`) can be encoded as the plain
characters it is. That is only right if the template copies texts unchanged, so every shape is
proved on its first rows against the tokenizer's `apply_chat_template`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

from fintune.errors import ModelError
from fintune.example import IGNORE_INDEX, Encoded, Message, Role
from fintune.files import sha256_bytes

PROOFS = 16
"""First rows of every shape that are rendered and tokenised whole, and compared."""

_SLOT = re.compile("\ue000(\\d+)\ue001")


class _Run(NamedTuple):
    """Consecutive text of one kind: pieces, each with whether it spells a control token."""

    pieces: list[tuple[str, bool]]
    trained: bool

    @property
    def raw(self) -> bool:
        return any(raw for _, raw in self.pieces)

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


class ChatFormat:
    """A tokenizer's chat template with its date pinned.

    Args:
        tokenizer: a fast tokenizer of transformers with a chat template.
        date_string: what the template prints as today's date, where it prints one.

    Raises:
        ModelError: no template, or one whose prompt is not a prefix of the conversation.
    """

    def __init__(self, tokenizer: Any, date_string: str) -> None:
        if not tokenizer.chat_template:
            what = f"the tokenizer of {tokenizer.name_or_path} has no chat template"
            fix = "use an instruct base, or put a chat_template.jinja into its folder"
            raise ModelError(what, fix=fix)
        self.tokenizer = tokenizer
        self.date_string = date_string
        self.template = tokenizer.get_chat_template()
        self.template_sha256 = sha256_bytes(self.template.encode())
        added = map(str, tokenizer.added_tokens_decoder.values())
        control = sorted({*added, *tokenizer.all_special_tokens}, key=len)
        self._special = re.compile("|".join(map(re.escape, reversed(control))))
        self._pieces = cache(self._cut)
        self._template_tokens = cache(self._count_template)
        self._proofs = Counter[tuple[Role, ...]]()

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Text of a conversation as the tokenizer's template writes it.

        Args:
            prompt: end with the header of an assistant turn, ready for generation.
        """
        rows = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self.tokenizer.apply_chat_template(
            rows, tokenize=False, add_generation_prompt=prompt, date_string=self.date_string
        )
        return text

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Ids and labels of a conversation that ends with an assistant turn."""
        return self.encode_many([messages])[0]

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Ids and labels of many conversations; one call of the tokenizer, so much faster.

        Labels are `IGNORE_INDEX` on everything but each assistant text and its end-of-turn token.
        Checked on every row: the trained ids decode to exactly those texts, and the sequence
        starts with its only BOS where the template writes one.

        Raises:
            ModelError: the template does not copy the texts unchanged, or has no end-of-turn.
        """
        stripped = [[_strip(message) for message in rows] for rows in conversations]
        runs = [self._runs(rows, prompt=False) for rows in stripped]
        ids = iter(self._tokenise([*chain.from_iterable(runs)]))
        encoded = []
        for of_row in runs:
            encoded.append(row := Encoded([], []))
            for run in of_row:
                row.input_ids.extend(of_run := next(ids))
                row.labels.extend(of_run if run.trained else [IGNORE_INDEX] * len(of_run))
        kept = [[label for label in row.labels if label != IGNORE_INDEX] for row in encoded]
        texts = self.tokenizer.backend_tokenizer.decode_batch(kept, skip_special_tokens=False)
        for proof in zip(stripped, runs, encoded, texts, strict=True):
            self._prove(*proof)
        return encoded

    def _prove(self, rows: list[Message], runs: list[_Run], row: Encoded, trained: str) -> None:
        """Hold a row against its texts; the first of a shape against the tokenizer's rendering."""
        if trained != "".join(run.text for run in runs if run.trained):
            raise _refused("or the tokenizer changes an answer", "labels would train another text")
        self._proofs[_shape(rows)] += 1
        if self._proofs[_shape(rows)] > PROOFS:
            return
        text = self.render(rows)
        if text != "".join(run.text for run in runs):
            raise _refused("changes the texts it is given", "a server would render another prompt")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != row.input_ids and not any(run.raw for run in runs):
            raise _refused("is joined with a text into one token", "a server's ids would differ")

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that a model answers to: all before the last assistant turn, and its header."""
        rows = [_strip(message) for message in messages]
        if rows and rows[-1].role == "assistant":
            rows.pop()
        return list(chain.from_iterable(self._tokenise(self._runs(rows, prompt=True))))

    def recorded(self, messages: Sequence[Message]) -> dict[str, Any]:
        """A conversation as a release records it: text, prompt, ids and labels as trained."""
        encoded = self.encode(messages)
        return {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "text": self.render(messages),
            "prompt": self.render(messages[:-1], prompt=True),
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "prompt_ids": self.prompt_ids(messages),
        }

    def text_tokens(self, messages: Sequence[Message], encoded: Encoded) -> int:
        """Tokens of the texts alone: the length less what the template takes."""
        return len(encoded.input_ids) - self._template_tokens(_shape(messages))

    def _count_template(self, shape: tuple[Role, ...]) -> int:
        empty = [Message(role, "") for role in shape]
        return sum(map(len, self._tokenise(self._runs(empty, prompt=False))))

    def _runs(self, messages: Sequence[Message], *, prompt: bool) -> list[_Run]:
        runs: list[_Run] = []
        for piece, trained in self._pieces(_shape(messages), prompt):
            text = piece if isinstance(piece, str) else messages[piece].content
            raw = text is not piece and bool(self._special.search(text))
            if not runs or runs[-1].trained != trained:
                runs.append(_Run([], trained))
            runs[-1].pieces.append((text, raw))
        return runs

    def _cut(self, shape: tuple[Role, ...], prompt: bool) -> list[tuple[str | int, bool]]:
        """The template's text for a shape, cut at the messages' texts, each as its index.

        Beside each piece: whether it is trained.
        """
        slots = [Message(role, f"\ue000{index}\ue001") for index, role in enumerate(shape)]
        first, *parts = _SLOT.split(self.render(slots, prompt=prompt))
        pieces: list[tuple[str | int, bool]] = [(first, False)]
        placed, whole = [int(number) for number in parts[::2]], self.render(slots)
        if sorted(placed) != [*range(len(shape))]:
            raise _refused(f"leaves out a turn of {' / '.join(shape)}", "it would not be trained")
        for index, text in zip(placed, parts[1::2], strict=True):
            if shape[index] != "assistant":
                pieces += [(index, False), (text, False)]
                continue
            end = self._special.match(text)
            if end is None:
                why = "a model trained without one never learns to stop"
                raise _refused("writes no end-of-turn token right after an answer", why)
            pieces += [(index, True), (end.group(), True), (text[end.end() :], False)]
            start = self.render(slots[:index], prompt=True) + slots[index].content
            if not prompt and not whole.startswith(start):
                why = "training would show the model another prompt than serving"
                raise _refused(f"writes a prompt that begins no conversation (turn {index})", why)
        return [piece for piece in pieces if piece[0] != ""]

    def _tokenise(self, runs: list[_Run]) -> list[list[int]]:
        """Ids of every run. A text met twice (a label, a header) is tokenised once.

        The backend is called past transformers, which would build masks and offsets that nobody
        reads; whatever padding or truncation an earlier caller left on it is taken off first.
        """
        unique = list(dict.fromkeys(run.text for run in runs if not run.raw))
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        encodings = backend.encode_batch_fast(unique, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(unique, encodings, strict=True)}
        return [self._tokenise_raw(run) if run.raw else ids[run.text] for run in runs]

    def _tokenise_raw(self, run: _Run) -> list[int]:
        ids: list[int] = []
        for text, raw in run.pieces:
            encoding = self.tokenizer(text, add_special_tokens=False, split_special_tokens=raw)
            ids += encoding["input_ids"]
        return ids


def _refused(what: str, why: str) -> ModelError:
    fix = "use an instruct base, whose template copies each message as it is"
    return ModelError(f"the chat template {what}", why=why, fix=fix)


def _shape(messages: Sequence[Message]) -> tuple[Role, ...]:
    return tuple(message.role for message in messages)


def _strip(message: Message) -> Message:
    """Templates trim texts (Llama's does); done before, so that a text is what it seems."""
    return Message(message.role, message.content.strip())
