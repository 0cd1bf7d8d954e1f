"""Messages <-> tokens and labels, and the answer in a generated text.

A conversation is rendered whole by the tokenizer's own template (`template.py`) and tokenised
whole. What is trained of it begins where the rendered prompt of an answer ends, which must tokenise
to ids that begin the conversation's ids, and ends with the tokens that the template writes behind
the answer. So any template can be read, and a server that renders it sends the ids that were
trained.

Where history is written otherwise than the last turn (thoughts dropped, system text moved), or one
token joins prompt and answer, a conversation becomes one example an answer: the prompt's ids and
the ids of what follows it.

A text that spells a control token (`<|eot_id|>`) stays text: it is marked before it is rendered and
tokenised apart, with transformers' own functions (`apply_chat_template(sanitize_control_tokens)`).
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from fintune.config import ChatConfig
from fintune.errors import ModelError
from fintune.example import IGNORE_INDEX, Encoded, Message, Role
from fintune.template import ChatTemplate, Refused

_MARKS = re.compile(f"[{mark_control_tokens('x', re.compile('x')).replace('x', '')}]")
"""What transformers puts around a spelled control token."""


class _Rendered(NamedTuple):
    """A rendered example: its text, and of each trained answer the prompt and where it ends."""

    text: str
    prompts: list[str]
    ends: list[int]

    @property
    def pieces(self) -> list[str]:
        """The text cut where an answer begins or ends: every second piece is trained."""
        made, at = [], 0
        for prompt, end in zip(self.prompts, self.ends, strict=True):
            made += [self.text[at : len(prompt)], self.text[len(prompt) : end]]
            at = end
        return [*made, self.text[at:]]


class _Tokens(NamedTuple):
    """Ids of a text and, but where it is marked, the first character of each."""

    ids: list[int]
    starts: list[int] | None


class ChatFormat:
    """A tokenizer with its chat template.

    Args:
        tokenizer: a fast tokenizer of transformers with a chat template.
        settings: `chat` of the config; thoughts are rendered where `thinking` is `keep`.
        stop_token_ids: of the base's generation_config.json.

    Attributes:
        stop_token_ids: every id that ends an answer: of the base, the tokenizer and the template.

    Raises:
        ModelError: no template, or one that cannot be trained on.
    """

    def __init__(
        self, tokenizer: Any, settings: ChatConfig, stop_token_ids: Collection[int] = ()
    ) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        stops = {*stop_token_ids, tokenizer.eos_token_id} - {None}
        tokens = tokenizer.convert_ids_to_tokens(sorted(stops))
        self.template = ChatTemplate(tokenizer, settings, tokens)
        self.template_sha256 = self.template.sha256
        self._template_tokens = cache(self._count_template)
        added = tokenizer.added_tokens_decoder.values()
        names = sorted((str(token) for token in added if token.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        (end,) = self._ids([self.template.end])
        self.stop_token_ids = sorted({*stops, *end[-1:]})

    def for_rows(self, conversations: Iterable[Sequence[Message]]) -> "ChatFormat":
        """With `chat.thinking` of `auto` decided: thoughts are kept if any conversation has one."""
        if self.settings.thinking != "auto":
            return self
        thinks = any(message.thought for rows in conversations for message in rows)
        settings = self.settings.model_copy(update={"thinking": "keep" if thinks else "drop"})
        return ChatFormat(self.tokenizer, settings, self.stop_token_ids)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Ids and labels of a conversation that ends with an answer: of its last example.

        Raises:
            ModelError: it cannot be trained on.
        """
        made = self.encode_many([messages])[0]
        if isinstance(made, Refused):
            raise ModelError(f"a conversation cannot be encoded: {made.reason} {made.detail}")
        return made[-1]

    def encode_many(
        self, conversations: Iterable[Sequence[Message]]
    ) -> list[list[Encoded] | Refused]:
        """The examples of many conversations: in few calls of the tokenizer, so faster.

        Labels are `IGNORE_INDEX` on everything but each answer and its end of turn. Checked for
        every example: the ids before an answer are the prompt's, the trained ids decode to what is
        to be trained.
        """
        marked = [[self._marked(message) for message in rows] for rows in conversations]
        rendered = [self._rendered(rows, split=self.template.splits) for rows in marked]
        known = self._known(rendered)
        for at, one in enumerate(rendered):
            if isinstance(one, list) and len(one[0].prompts) > 1 and not _begins(one[0], known):
                rendered[at] = one = self._rendered(marked[at], split=True)
                known |= self._known([one])
        made = [
            one if isinstance(one, Refused) else [self._labelled(each, known) for each in one]
            for one in rendered
        ]
        return self._checked(made, rendered)

    def _marked(self, message: Message) -> Message:
        """A turn whose texts are stripped, as templates do, and hold no whole control token."""

        def mark(text: str) -> str:
            text = text.strip()
            spelled = self.template.control.search(text) or _MARKS.search(text)
            return mark_control_tokens(text, self.template.control) if spelled else text

        return message.changed(mark, "content", "thought", "tool_calls", "tools")

    def _rendered(self, rows: Sequence[Message], *, split: bool) -> list[_Rendered] | Refused:
        """The examples of a conversation as text: one, or one an answer.

        Args:
            split: one an answer; otherwise only where the whole does not begin with a prompt.
        """
        if refused := self.template.refusal(rows):
            return refused
        answers = [at for at, turn in enumerate(rows) if turn.role == "assistant" and turn.trained]
        if not answers:
            return Refused("masked_answers")
        split = split or any(message.tool_calls for message in rows)
        groups = [[at] for at in answers] if split else [answers]
        made = []
        for group in groups:
            whole = self.template.attempt(rows[: group[-1] + 1])
            prompts = [self.template.attempt(rows[:at], prompt=True) for at in group]
            for said in (whole, *prompts):
                if isinstance(said, Refused):
                    return said
            one = self._placed(rows, group, str(whole), [str(prompt) for prompt in prompts])
            if one is None and not split:
                return self._rendered(rows, split=True)
            if one is None:
                return Refused("template", "it changes an answer, or renders another prompt")
            made.append(one)
        return made

    def _placed(
        self, rows: Sequence[Message], answers: list[int], whole: str, prompts: list[str]
    ) -> _Rendered | None:
        """Find the answers in their rendered conversation; None where one is not found."""
        last, ends = prompts[-1], []
        rest = self.template.rest(whole, last)
        final = rows[answers[-1]]
        plain = not (final.thought and self.template.thinks) and not final.tool_calls
        if rest is None and plain and len(answers) == 1:  # a system text that moves with the prompt
            rest = self.template.answered(final)
        if rest is None:
            return None
        whole = last + rest
        for at, prompt in zip(answers, prompts, strict=True):
            span = self.template.span(whole[len(prompt) :], rows[at])
            if span is None or not whole.startswith(prompt):
                return None
            end = len(prompt) + span
            written = self.template.end_of(whole[end:])
            if not written and rows[at] is final and not final.tool_calls:
                written = self.template.end
                whole = whole[:end] + written
            ends.append(end + len(written))
        return _Rendered(whole, prompts, ends)

    def _labelled(self, one: _Rendered, known: dict[str, _Tokens]) -> Encoded:
        if not _begins(one, known):  # of one answer, which a token joins with its prompt
            whole = Encoded([], [])
            parts = [known[one.prompts[0]].ids, *map(self._continued, one.pieces[1:])]
            for at, part in enumerate(parts):
                whole.input_ids.extend(part)
                whole.labels.extend(part if at % 2 else [IGNORE_INDEX] * len(part))
            return whole
        ids, starts = known[one.text]
        labels = [IGNORE_INDEX] * len(ids)
        for prompt, end in zip(one.prompts, one.ends, strict=True):
            if starts is None:
                stop = len(self._ids([one.text[:end]])[0])
            else:
                stop = bisect_left(starts, end)
            trained = slice(len(known[prompt].ids), stop)
            labels[trained] = ids[trained]
        return Encoded(ids, labels)

    def _checked(
        self, made: list[list[Encoded] | Refused], rendered: list[list[_Rendered] | Refused]
    ) -> list[list[Encoded] | Refused]:
        """Refuse a conversation whose trained ids do not decode to what is to be trained."""
        pairs = [
            (at, one, _MARKS.sub("", "".join(text.pieces[1::2])))
            for at, (rows, texts) in enumerate(zip(made, rendered, strict=True))
            if isinstance(rows, list) and isinstance(texts, list)
            for one, text in zip(rows, texts, strict=True)
        ]
        kept = [[label for label in one.labels if label != IGNORE_INDEX] for _, one, _ in pairs]
        decode = self.tokenizer.backend_tokenizer.decode_batch
        decoded = decode(kept, skip_special_tokens=False)
        for (at, _, wanted), text in zip(pairs, decoded, strict=True):
            # SentencePiece writes a space at the start of a text, and drops one there in decoding.
            if text != wanted and text.replace(" ", "") != wanted.replace(" ", ""):
                made[at] = Refused("tokenizer", "the trained tokens decode to another text")
        return made

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that a model answers to: all before the last assistant turn, and its header.

        Raises:
            ModelError: the template does not render these messages.
        """
        rows = [self._marked(message) for message in messages]
        if rows and rows[-1].role == "assistant":
            rows.pop()
        said = self.template.attempt(rows, prompt=True)
        if isinstance(said, Refused):
            raise ModelError(f"the chat template refuses these messages: {said.detail}")
        return self._ids([said])[0]

    def recorded(self, messages: Sequence[Message]) -> dict[str, Any]:
        """A conversation as a release records it: text, prompt, ids and labels as trained."""
        encoded = self.encode(messages)
        return {
            "messages": [message.record for message in messages],
            "text": self.template.render(messages),
            "prompt": self.template.render(messages[:-1], prompt=True),
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "prompt_ids": self.prompt_ids(messages),
        }

    def text_tokens(self, messages: Sequence[Message], encoded: Encoded) -> int:
        """Tokens of the texts alone: the length less what the template takes."""
        return len(encoded.input_ids) - self._template_tokens(tuple(m.role for m in messages))

    def _count_template(self, shape: tuple[Role, ...]) -> int:
        said = self.template.attempt([Message(role, "x") for role in shape])
        return 0 if isinstance(said, Refused) else len(self._ids([said])[0]) - len(shape)

    def _known(self, rendered: Iterable[list[_Rendered] | Refused]) -> dict[str, _Tokens]:
        """Tokens of every text and prompt, each tokenised whole."""
        examples = [one for rows in rendered if isinstance(rows, list) for one in rows]
        prompts = list(dict.fromkeys(prompt for one in examples for prompt in one.prompts))
        known = {p: _Tokens(ids, None) for p, ids in zip(prompts, self._ids(prompts), strict=True)}
        texts = list(dict.fromkeys(one.text for one in examples))
        encodings = self._backend().encode_batch(texts, add_special_tokens=False)
        return known | {
            text: _Tokens(self._ids([text])[0], None)
            if _MARKS.search(text)
            else _Tokens(encoding.ids, [start for start, _ in encoding.offsets])
            for text, encoding in zip(texts, encodings, strict=True)
        }

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered texts, of marked ones as `apply_chat_template` makes them."""
        encodings = self._backend().encode_batch_fast(texts, add_special_tokens=False)
        return [
            encode_marked_chat(self.tokenizer, text) if _MARKS.search(text) else encoding.ids
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _backend(self) -> Any:
        """The tokenizer past transformers, which would build masks that nobody reads; whatever
        padding or truncation an earlier caller left on it is taken off."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return backend

    def _continued(self, text: str) -> list[int]:
        """Ids of a text inside of another one.

        SentencePiece writes a space before a text's first word, so it is tokenised behind a line
        end, unless that joins it.
        """
        line, whole, alone = self._ids(["\n", f"\n{text}", text])
        return whole[len(line) :] if whole[: len(line)] == line else alone

    def answer(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The answer in generated ids, behind a thought; and whether they end inside of one.

        A thought that was cut by the limit of tokens is no answer.
        """
        stops = {*self.stop_token_ids}
        kept = [token for token in ids if token not in stops]
        reader = self.reader()
        text = reader.feed(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))
        return (text + reader.finish()).strip(), reader.inside

    def reader(self, *, thoughts: bool = False) -> "AnswerReader":
        """Reads an answer from pieces of generated text that hold their control tokens.

        Args:
            thoughts: leave them in.
        """
        if thoughts:
            return AnswerReader("", "", "", self._special)
        of = self.template
        return AnswerReader(of.opened, of.begins, of.close, self._special)


class AnswerReader:
    """Takes the thought before an answer and all special tokens out of a stream of text.

    Args:
        opened: the beginning of a thought at the end of the prompt.
        begins: what a thought begins with where the prompt opens none.
        close: what an answer comes behind, where there is a thought.
        special: matches the special tokens.

    Attributes:
        inside: the text so far is a thought, no answer.
    """

    def __init__(self, opened: str, begins: str, close: str, special: re.Pattern[str]) -> None:
        self._begins, self._close, self._special = begins, close, special
        self._held, self._decided = "", not close
        self.inside = bool(opened)

    def feed(self, text: str) -> str:
        """The part of the answer that a further piece of text makes known."""
        if self._decided:
            return self._special.sub("", text)
        self._held += text
        if not self.inside:
            held = self._held.lstrip()
            if held.startswith(self._begins):
                self.inside = True
            elif not self._begins.startswith(held):
                return self.finish()
        before, close, answer = self._held.partition(self._close)
        if self.inside and close:
            self._held, self._decided, self.inside = "", True, False
            return self._special.sub("", answer).lstrip()
        return ""

    def finish(self) -> str:
        """What is held back of an answer; nothing of a thought that did not end."""
        text, self._held, self._decided = self._held, "", True
        return "" if self.inside else self._special.sub("", text)


def _begins(one: _Rendered, known: dict[str, _Tokens]) -> bool:
    """Whether the ids of an example begin with those of each of its prompts."""
    ids = known[one.text].ids
    return all(known[prompt].ids == ids[: len(known[prompt].ids)] for prompt in one.prompts)
