"""What a chat template writes: rendered conversations, and where in them an answer stands.

Nothing is known of a template but what it renders. `ChatTemplate` renders a few shapes with
stand-ins for the texts and learns from them whether it takes a system text, what ends a turn,
whether a prompt begins a thought, and whether history is written as the last turn is.
"""

import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

import jinja2

from fintune.config import ChatConfig
from fintune.errors import ModelError
from fintune.example import Message
from fintune.files import sha256_bytes

_SYSTEM, _USER, _ANSWER, _USER2, _ANSWER2 = (f"\ue000Aa{number}\ue001" for number in range(5))
"""Stand for texts where a template is looked at; with letters, which a template may change."""
_DATE = re.compile(r"strftime_now\(\s*(['\"])([^'\"]+)\1\s*\)")
_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What a template raises: itself (`raise_exception`), or on a shape that it was not written for."""


class Refused(NamedTuple):
    """Why a conversation cannot be trained on: the ledger's reason, and its detail."""

    reason: str
    detail: str = ""


class ChatTemplate:
    """A tokenizer's chat template with its date pinned.

    Args:
        tokenizer: a tokenizer of transformers.
        settings: `chat` of the config; thoughts are rendered where `thinking` is `keep`.
        stops: tokens that end an answer in generation.

    Attributes:
        sha256: of the template's text.
        control: matches the tokens that a text of a row must never become.
        end: text of the tokens that end an answer and are trained with it.
        splits: history is written otherwise than the last turn.
        thinks: thoughts of the rows are rendered.
        begins, close: around a thought that a model may write before its answer.
        opened: the beginning of a thought with which a prompt ends.
        notes: what the template made necessary, a line each.

    Raises:
        ModelError: no template, or none that can be trained on.
    """

    def __init__(self, tokenizer: Any, settings: ChatConfig, stops: Collection[str]) -> None:
        if not tokenizer.chat_template:
            what = f"the tokenizer of {tokenizer.name_or_path} has no chat template"
            fix = "use an instruct base, or put a chat_template.jinja into its folder"
            raise ModelError(what, fix=fix)
        self._tokenizer, self._settings, self._stops = tokenizer, settings, stops
        self._source = tokenizer.get_chat_template()
        self.sha256 = sha256_bytes(self._source.encode())
        self._pinned = _DATE.sub(self._date, self._source)
        self._variables = self._chosen_variables()
        # The rule of transformers' own `sanitize_control_tokens`.
        names = {str(t) for t in tokenizer.added_tokens_decoder.values() if self._is_control(t)}
        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
        self.control = re.compile(pattern)
        self._end_run = re.compile(rf"(?:\s*(?:{pattern}))+")
        self.notes: list[str] = []
        self._merges = self._embeds = self._parts = False
        self.thinks = settings.thinking == "keep"
        self._bridge, self.opened = ("", ""), ""
        self._look_at_answers()
        self._look_at_history()
        self._look_at_thoughts()
        call = {"type": "function", "function": {"name": _SYSTEM, "arguments": {}}}
        calls = Message("assistant", _ANSWER, tool_calls=json.dumps([call], ensure_ascii=False))
        said = self.attempt([Message("user", _USER), calls])
        self._calls = isinstance(said, Refused) or "Aa0" in said

    def _is_control(self, token: Any) -> bool:
        text = str(token)
        return bool(token.special or (text in self._source and text.strip()))

    def _date(self, call: re.Match[str]) -> str:
        """A call of `strftime_now` as the constant that it is on the pinned day."""
        try:
            day = datetime.strptime(self._settings.date_string, "%d %b %Y")
        except ValueError:
            return repr(self._settings.date_string)
        return repr(day.strftime(call[2]))

    def _chosen_variables(self) -> dict[str, Any]:
        named = set(re.findall(r"\w+", self._source))
        thinks = self._settings.thinking == "keep"
        chosen: dict[str, Any] = {"date_string": self._settings.date_string}
        chosen |= {name: thinks for name in ("enable_thinking", "thinking") if name in named}
        if "reasoning_effort" in named and not thinks:
            least = "none" if re.search("['\"]none['\"]", self._source) else "low"
            chosen["reasoning_effort"] = least
        return chosen | self._settings.template_kwargs

    def _look_at_answers(self) -> None:
        turns = [Message("user", _USER), Message("assistant", _ANSWER)]
        self._parts = _ANSWER not in str(self.attempt(turns))
        said = self.attempt([Message("system", _SYSTEM), turns[0]], prompt=True)
        if isinstance(said, Refused) or _SYSTEM not in said:
            self._merges = True
            self.notes.append("it takes no system text, which goes before the first question")
        whole, prompt = self._must(turns), self._must(turns[:1], prompt=True)
        if _USER not in prompt or _ANSWER not in whole:
            why = "another text would be trained"
            raise _unusable("leaves out a turn or changes its text", why)
        begun = prompt[len(os.path.commonprefix([whole, prompt])) :]
        if tag := re.fullmatch(r"<(\w+)>(\n?)", begun):
            self.opened = begun.strip()
            empty = "\n" * (1 + (not tag[2]))
            self._bridge = begun, f"{empty}</{tag[1]}>\n\n"
            self.notes.append(f"its prompt opens a thought ({self.opened}), which answers close")
        elif begun:
            self._bridge = begun, ""
            self.notes.append(f"its prompt holds what conversations lack: {begun.strip()!r}")
        rest = self.rest(whole, prompt)
        if rest is None or (begun and not self.opened and not rest.startswith(_ANSWER)):
            why = "training would show the model another prompt than serving"
            raise _unusable("writes a prompt that begins no conversation", why)
        self._lead, _, self._tail = rest.partition(_ANSWER)
        tags = re.findall(r"</\w+>", self._lead)
        words = re.findall(rf"\w*(?:{self.control.pattern})", self._lead)
        written = tags or words or ["</think>"] * ("</think>" in self._source)
        self.close = written[-1] if written else ""
        self.begins = self.close.replace("</", "<") if tags or not words else words[0]

    def _look_at_history(self) -> None:
        texts = (("user", _USER), ("assistant", _ANSWER), ("user", _USER2), ("assistant", _ANSWER2))
        turns = [Message(role, text) for role, text in texts]  # type: ignore[arg-type]
        said = self.attempt(turns)
        history = "" if isinstance(said, Refused) else said
        between = history.partition(_ANSWER)[2].partition(_USER2)[0]
        own = self.end_of(self._tail)
        self.end = own or self.end_of(between) or self._tokenizer.eos_token or ""
        if not self.end:
            why = "a model trained without an end never learns to stop"
            raise _unusable("ends no turn, and the tokenizer has no end-of-text token", why)
        if not own:
            self.notes.append(f"it ends the last turn with nothing: {self.end!r} is trained there")
        self.splits = bool(history) and (
            self.end_of(between) not in (own, self.end)
            or not history.startswith(self._must(turns[:1], prompt=True) + self._lead + _ANSWER)
            or not history.startswith(self._must(turns[:3], prompt=True))
        )
        if self.splits:
            self.notes.append(
                "it writes history otherwise than the last turn: an example an answer"
            )

    def _look_at_thoughts(self) -> None:
        if not self.thinks:
            return
        turns = [Message("user", _USER), Message("assistant", _ANSWER, thought=_SYSTEM)]
        known = "think>" in self._source or "<think>" in self._tokenizer.get_vocab()
        for embeds in (False, True)[: 1 + known]:
            self._embeds = embeds
            said = self.attempt(turns)
            if not isinstance(said, Refused) and _SYSTEM in said:
                return
        self.thinks = self._embeds = False
        self.notes.append("it writes no thoughts: those of the rows are dropped")

    def rest(self, whole: str, prompt: str) -> str | None:
        """What a conversation writes behind the prompt of its last answer; None: another prompt.

        Where a prompt ends with an empty thought, or opens one, that the conversation lacks, the
        rest is what follows it, the end of the thought first.
        """
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        begun, closed = self._bridge
        header = prompt.removesuffix(begun)
        if not whole.startswith(header) or len(header) == len(prompt):
            return None
        return closed + whole[len(header) :]

    def answered(self, message: Message) -> str:
        """What follows the prompt of an answer by what was learnt, whatever the conversation."""
        return self._lead + message.content + self._tail

    def end_of(self, tail: str) -> str:
        """The tokens at the start of a text that end a turn; nothing where there are none.

        Of several control tokens in a row those up to the first that ends an answer in generation,
        else the first one.
        """
        run = self._end_run.match(tail)
        if run is None:
            return ""
        found = [*self.control.finditer(run[0])]
        stop = next((each for each in found if each[0] in self._stops), found[0])
        return tail[: stop.end()]

    def span(self, rest: str, message: Message) -> int | None:
        """Where the text of an answer ends in what its prompt is followed by; None: not there."""
        if message.tool_calls:  # written in the template's own way, up to the end of the turn
            return len(rest.rstrip())
        start = len(self._lead) if rest.startswith(self._lead) else 0
        if message.thought and self.thinks:
            at = rest.find(message.thought)
            if at < 0:
                return None
            start = at + len(message.thought)
        at = rest.find(message.content, start)
        return None if at < 0 else at + len(message.content)

    def _must(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        said = self.attempt(messages, prompt=prompt)
        if isinstance(said, Refused):
            fix = "use an instruct base, or repair its chat_template.jinja"
            raise ModelError(f"the chat template fails: {said.detail}", fix=fix)
        return said

    def attempt(self, messages: Sequence[Message], *, prompt: bool = False) -> str | Refused:
        """`render`, or the template's own words on why it does not."""
        try:
            return self.render(messages, prompt=prompt)
        except _ERRORS as error:
            shape = " / ".join(message.role for message in messages)
            return Refused("template", f"{type(error).__name__} on {shape[:80]}: {error}"[:300])

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Text of a conversation as the tokenizer's template writes it.

        Args:
            prompt: end with the header of an assistant turn, ready for generation.

        Raises:
            jinja2.TemplateError, TypeError, ValueError, KeyError: by the template.
        """
        tools = messages[0].tools
        text: str = self._tokenizer.apply_chat_template(
            [self._turn(message) for message in self._merged(messages)],
            tools=json.loads(tools) if tools else None,
            chat_template=self._pinned,
            tokenize=False,
            add_generation_prompt=prompt,
            **self._variables,
        )
        return text

    def _merged(self, messages: Sequence[Message]) -> Sequence[Message]:
        if not self._merges or messages[0].role != "system" or len(messages) < 2:
            return messages
        system, first, *more = messages
        text = f"{system.content}\n\n{first.content}"
        return [replace(first, content=text, tools=system.tools), *more]

    def _turn(self, message: Message) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thought and self.thinks:
            if self._embeds:
                turn["content"] = f"<think>\n{message.thought}\n</think>\n\n{message.content}"
            else:
                turn["reasoning_content"] = message.thought
        if self._parts:  # as templates of vision models take it
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        if message.tool_calls:
            turn["tool_calls"] = json.loads(message.tool_calls)
        return turn

    def refusal(self, messages: Sequence[Message]) -> Refused | None:
        """Why these rows are dropped by the settings, whatever the template does."""
        merged = self._merges and messages[0].role == "system"
        if merged and self._settings.no_system_role == "drop":
            return Refused("no_system_role")
        if self._settings.control_tokens == "drop":
            for message in messages:
                if found := self.control.search(message.content):
                    return Refused("control_token", found[0])
        if messages[0].tools and not re.search(r"\btools\b", self._source):
            return Refused("template", "it takes no tools")
        if any(message.tool_calls for message in messages) and not self._calls:
            return Refused("tool_calls", "the template writes none")
        return None

    @property
    def record(self) -> dict[str, Any]:
        """What manifest, fixture and card say of how conversations became text."""
        return {
            "settings": self._settings.model_dump(mode="json"),
            "variables": self._variables,
            "end": self.end,
            "examples": "one an answer" if self.splits else "one a conversation",
            "notes": self.notes,
        }


def _unusable(what: str, why: str) -> ModelError:
    fix = "use an instruct base, whose template copies each message as it is"
    return ModelError(f"the chat template {what}", why=why, fix=fix)
