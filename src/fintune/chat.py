"""Messages <-> tokens and labels: the only user of a chat template.

Ids and labels grow together. A conversation is cut into *runs* of text: what the model reads
(not trained) and, for every assistant turn, its text with the end-of-turn token (trained). Runs
are tokenised apart, exactly as a server does it: the prompt alone, then the answer token by token.

The template is rendered once per conversation shape (the order of roles) with placeholders for
the texts, so that a text which spells a control token (`<|eot_id|>`) can be encoded as the plain
characters it is. That is only right if the template copies texts unchanged, so every shape is
proved on its first rows against the tokenizer's own `apply_chat_template`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fintune.errors import ModelError
from fintune.example import IGNORE_INDEX, Encoded, Message
from fintune.files import sha256_bytes

PROOFS = 16
"""First rows of every shape that are rendered and tokenised whole, and compared."""

_SLOT = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text of the template, or (when `message` is set) the place of that message's text."""

    text: str
    message: int | None
    trained: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive text of one kind: pieces, each with whether it spells a control token."""

    pieces: tuple[tuple[str, bool], ...]
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
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                why="without one, training and serving would invent two different prompts",
                fix="use an instruct base, or put a chat_template.jinja into its folder",
            )
        self.tokenizer = tokenizer
        self.date_string = date_string
        self.template = tokenizer.get_chat_template()
        self.template_sha256 = sha256_bytes(self.template.encode())
        longest_first = sorted(_control_tokens(tokenizer), key=len)[::-1]
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self._shapes: dict[tuple[tuple[str, ...], bool], list[_Piece]] = {}
        self._template_tokens: dict[tuple[str, ...], int] = {}
        self._proofs: Counter[tuple[str, ...]] = Counter()

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
        ids = self._tokenise(list(chain.from_iterable(runs)))
        encoded, at = [], 0
        for rows, own in zip(stripped, runs, strict=True):
            encoded.append(self._join(own, ids[at : at + len(own)]))
            at += len(own)
            shape = _shape(rows)
            if self._proofs[shape] < PROOFS:
                self._proofs[shape] += 1
                self._prove(rows, own, encoded[-1])
        self._check_decoded(runs, encoded)
        return encoded

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
        """Tokens of the conversation's own texts: its length less what the template alone takes."""
        shape = _shape(messages)
        if shape not in self._template_tokens:
            empty = [Message(message.role, "") for message in messages]
            runs = self._runs(empty, prompt=False)
            self._template_tokens[shape] = sum(len(ids) for ids in self._tokenise(runs))
        return len(encoded.input_ids) - self._template_tokens[shape]

    def _runs(self, messages: Sequence[Message], *, prompt: bool) -> list[_Run]:
        runs: list[_Run] = []
        current: list[tuple[str, bool]] = []
        trained = False
        for piece in self._pieces(_shape(messages), prompt):
            if piece.trained != trained:
                runs.append(_Run(tuple(current), trained))
                current, trained = [], piece.trained
            if piece.message is None:
                current.append((piece.text, False))
            else:
                text = messages[piece.message].content
                current.append((text, bool(self._special.search(text))))
        runs.append(_Run(tuple(current), trained))
        return [run for run in runs if run.pieces]

    def _pieces(self, shape: tuple[str, ...], prompt: bool) -> list[_Piece]:
        """The template's text for a shape, cut at the messages' texts; made once a shape."""
        if (shape, prompt) in self._shapes:
            return self._shapes[shape, prompt]
        slots = [Message(role, f"\ue000{index}\ue001") for index, role in enumerate(shape)]  # type: ignore[arg-type]
        parts = _SLOT.split(self.render(slots, prompt=prompt))
        pieces = [_Piece(parts[0], None, False)]
        for number, text in zip(parts[1::2], parts[2::2], strict=True):
            index = int(number)
            answer = shape[index] == "assistant"
            pieces.append(_Piece("", index, answer))
            end = self._special.match(text) if answer else None
            if answer and end is None:
                raise ModelError(
                    "the chat template writes no end-of-turn token right after an answer",
                    why="a model trained without one never learns to stop",
                    fix="use the template of an instruct base",
                )
            cut = end.end() if end else 0
            pieces += [_Piece(text[:cut], None, True), _Piece(text[cut:], None, False)]
        pieces = [piece for piece in pieces if piece.text or piece.message is not None]
        placed = [piece.message for piece in pieces if piece.message is not None]
        if sorted(placed) != [*range(len(shape))]:
            raise ModelError(f"the chat template leaves out a turn of {' / '.join(shape)}")
        self._shapes[shape, prompt] = pieces
        if not prompt:
            self._prove_prefixes(shape, slots)
        return pieces

    def _prove_prefixes(self, shape: tuple[str, ...], slots: list[Message]) -> None:
        """Every answer's prompt, rendered for generation, must begin the rendered conversation."""
        whole = self.render(slots)
        for index, role in enumerate(shape):
            prompt = self.render(slots[:index], prompt=True) if role == "assistant" else ""
            if not whole.startswith(prompt + (slots[index].content if prompt else "")):
                raise ModelError(
                    f"the chat template's prompt is no prefix of the conversation (turn {index})",
                    why="training would show the model another prompt than serving",
                    fix="use a template without content that depends on later turns",
                )

    def _tokenise(self, runs: list[_Run]) -> list[list[int]]:
        """Ids of every run. A text met twice (a label, a header) is tokenised once.

        The backend is called past transformers, which would build masks and offsets that nobody
        reads; whatever padding or truncation an earlier caller left on it is taken off first.
        """
        texts = ["" if run.raw else run.text for run in runs]
        unique = list(dict.fromkeys(texts))
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        found = backend.encode_batch_fast(unique, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(unique, found, strict=True)}
        return [
            self._tokenise_raw(run) if run.raw else ids[text]
            for run, text in zip(runs, texts, strict=True)
        ]

    def _tokenise_raw(self, run: _Run) -> list[int]:
        ids: list[int] = []
        for text, raw in run.pieces:
            found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=raw)
            ids += found["input_ids"]
        return ids

    @staticmethod
    def _join(runs: list[_Run], ids: list[list[int]]) -> Encoded:
        input_ids: list[int] = []
        labels: list[int] = []
        for run, own in zip(runs, ids, strict=True):
            input_ids += own
            labels += own if run.trained else [IGNORE_INDEX] * len(own)
        return Encoded(input_ids, labels)

    def _prove(self, rows: list[Message], runs: list[_Run], encoded: Encoded) -> None:
        """Compare with the tokenizer's own rendering, and with tokenising it whole."""
        text = self.render(rows)
        if text != "".join(run.text for run in runs):
            raise ModelError(
                "the chat template changes the texts it is given",
                why="what is trained would not be what a server renders",
                fix="use a template that copies each message as it is",
            )
        if any(run.raw for run in runs):
            return
        if self.tokenizer(text, add_special_tokens=False)["input_ids"] != encoded.input_ids:
            raise ModelError(
                "the tokenizer joins template and text into one token",
                why="the prompt's ids would differ between training and serving",
                fix="use a tokenizer with special tokens around each turn",
            )

    def _check_decoded(self, runs: list[list[_Run]], encoded: list[Encoded]) -> None:
        kept = [[label for label in row.labels if label != IGNORE_INDEX] for row in encoded]
        texts = self.tokenizer.backend_tokenizer.decode_batch(kept, skip_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        for own, text, row in zip(runs, texts, encoded, strict=True):
            expected = "".join(run.text for run in own if run.trained)
            if text != expected:
                raise ModelError(
                    f"trained tokens decode to {text[:80]!r}, not to {expected[:80]!r}",
                    why="the label mask would train something else than the answer",
                    fix="report this base: its tokenizer does not decode what it encodes",
                )
            if bos in row.input_ids and row.input_ids.count(bos) + (row.input_ids[0] != bos) != 1:
                raise ModelError("a conversation holds BOS twice, or not at its start")


def _shape(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.role for message in messages)


def _strip(message: Message) -> Message:
    """Templates trim texts (Llama's does); done before, so that a text is what it seems."""
    return Message(message.role, message.content.strip())


def _control_tokens(tokenizer: Any) -> set[str]:
    """Every string that the tokenizer would read as one control token."""
    added = tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added} | set(tokenizer.all_special_tokens)
