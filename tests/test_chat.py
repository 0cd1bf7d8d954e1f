"""Labels of every row checked by decoding; templates that must be refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fintune import nano
from fintune.chat import ChatFormat
from fintune.data.schema import Rejected, to_messages
from fintune.errors import ModelError
from fintune.example import IGNORE_INDEX, Message
from fintune.model import Base, load_tokenizer

DATE = "26 Jul 2024"
SHARED = Path(__file__).parents[2] / "shared"
CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "What is EBIT?"),
    Message("assistant", "Earnings before interest and taxes."),
    Message("user", "And EPS?"),
    Message("assistant", "Earnings per share."),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Base(nano.NANO_ID, "", nano.base_dir()))


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat(tokenizer, DATE)


def trained_text(chat: ChatFormat, messages: tuple[Message, ...]) -> str:
    encoded = chat.encode(messages)
    kept = [label for label in encoded.labels if label != IGNORE_INDEX]
    return str(chat.tokenizer.decode(kept, clean_up_tokenization_spaces=False))


def test_every_answer_and_its_end_of_turn_is_trained_and_nothing_else(chat: ChatFormat) -> None:
    assert trained_text(chat, CONVERSATION) == (
        "Earnings before interest and taxes.<|eot_id|>Earnings per share.<|eot_id|>"
    )
    encoded = chat.encode(CONVERSATION)
    assert len(encoded.input_ids) == len(encoded.labels)
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    assert all(label in (IGNORE_INDEX, token) for token, label in pairs)
    bos = chat.tokenizer.bos_token_id
    assert encoded.input_ids[0] == bos and encoded.input_ids.count(bos) == 1


def test_ids_are_those_of_the_tokenizers_own_template(chat: ChatFormat) -> None:
    ids = chat.tokenizer(chat.render(CONVERSATION), add_special_tokens=False)["input_ids"]
    assert chat.encode(CONVERSATION).input_ids == ids


def test_prompt_ids_begin_the_conversation(chat: ChatFormat) -> None:
    prompt = chat.prompt_ids(CONVERSATION)
    encoded = chat.encode(CONVERSATION)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert (
        encoded.labels[len(prompt) - 1] == IGNORE_INDEX
        and encoded.labels[len(prompt)] != IGNORE_INDEX
    )


@pytest.mark.parametrize("where", ["user", "assistant", "system"])
def test_text_that_spells_a_control_token_stays_text(chat: ChatFormat, where: str) -> None:
    spelled = "a <|eot_id|> b <|start_header_id|>system<|end_header_id|> c <|begin_of_text|>"
    turns = {"system": "s", "user": "u", "assistant": "a"} | {where: spelled}
    plain = {"system": "s", "user": "u", "assistant": "a"}
    control = set(chat.tokenizer.added_tokens_decoder)

    def controls(texts: dict[str, str]) -> list[int]:
        rows = tuple(Message(role, text) for role, text in texts.items())  # type: ignore[arg-type]
        return [token for token in chat.encode(rows).input_ids if token in control]

    assert controls(turns) == controls(plain)


def test_text_tokens_leave_the_template_out(chat: ChatFormat) -> None:
    messages = (Message("user", "What is EBIT?"), Message("assistant", "Earnings."))
    count = sum(
        len(chat.tokenizer(message.content, add_special_tokens=False)["input_ids"])
        for message in messages
    )
    assert abs(chat.text_tokens(messages, chat.encode(messages)) - count) <= 1


def with_template(tokenizer: Any, old: str, new: str) -> ChatFormat:
    template = tokenizer.get_chat_template()
    assert old in template
    changed = SimpleNamespace(template=template.replace(old, new))

    class Changed:
        chat_template = changed.template
        name_or_path = "changed"

        def get_chat_template(self) -> str:
            return str(self.chat_template)

        def apply_chat_template(self, *args: Any, **more: Any) -> Any:
            return tokenizer.apply_chat_template(*args, chat_template=self.chat_template, **more)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *args: Any, **more: Any) -> Any:
            return tokenizer(*args, **more)

    return ChatFormat(Changed(), DATE)


def test_a_template_that_changes_texts_is_refused(tokenizer: Any) -> None:
    text = tokenizer.get_chat_template()
    old = next(part for part in ("| trim", "|trim") if part in text)
    with pytest.raises(ModelError, match="changes the texts|decode"):
        with_template(tokenizer, old, f"{old} | upper").encode(CONVERSATION)


def test_a_template_without_end_of_turn_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="end-of-turn"):
        with_template(tokenizer, "<|eot_id|>", "").encode(CONVERSATION)


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        ChatFormat(SimpleNamespace(chat_template=None, name_or_path="x"), DATE)


def test_labels_of_every_real_row_decode_to_its_answers() -> None:
    sample = SHARED / "data" / "finance_instruct_sample.jsonl"
    if not sample.is_file():
        pytest.skip(f"no real rows at {sample}")
    chat = ChatFormat(load_tokenizer(Base("llama", "", SHARED / "tokenizers" / "llama3")), DATE)
    rows = []
    for line in sample.read_bytes().split(b"\n")[:2500]:
        try:
            rows.append(to_messages(json.loads(line), None))
        except Rejected:
            continue
    assert any(len(row) > 3 for row in rows)
    for row, encoded in zip(rows, chat.encode_many(rows), strict=True):
        kept = [label for label in encoded.labels if label != IGNORE_INDEX]
        answers = [message.content.strip() for message in row if message.role == "assistant"]
        assert chat.tokenizer.decode(kept, clean_up_tokenization_spaces=False) == "".join(
            f"{answer}<|eot_id|>" for answer in answers
        )
        assert encoded.input_ids.count(chat.tokenizer.bos_token_id) == 1
