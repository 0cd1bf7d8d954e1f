"""Chat templates: what is refused, what stays text; test_frozen_prepare.py holds ids and labels."""

import json
import shutil
from pathlib import Path

import frozen
import pytest
import tiny
from transformers import AutoTokenizer

from fintune.chat import ChatFormat
from fintune.config import ChatConfig
from fintune.data.schema import Rejected, to_messages
from fintune.example import IGNORE_INDEX, Message
from fintune.model import Base, load_tokenizer
from fintune.template import Refused

TURN = "message['content'] | trim"


def prepare(
    root: Path, rows: list[tuple[str, str, str]], old: str = "", new: str = ""
) -> tiny.Said:
    """Prepare rows (system, user, assistant) by the tiny base with a changed template."""
    base = shutil.copytree(tiny.base(), root / "base")
    template = base / "chat_template.jinja"
    assert old in template.read_text()
    template.write_text(template.read_text().replace(old, new))
    names = ("system", "instruction", "output")
    lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows]
    (root / "rows.jsonl").write_text("".join(lines))
    changes = {"base_path": str(base), "source": str(root / "rows.jsonl"), "out": str(root)}
    shares = {"validation_share": 0.2, "test_share": 0.2, "min_tokens": 1}
    return tiny.fintune("prepare", "-c", tiny.config(), *tiny.words(**changes, **shares))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (TURN, f"{TURN} | upper", "changes its text"),
        (TURN, "message['role']", "leaves out a turn"),
        ("assistant<|end_header_id|>", "model<|end_header_id|>", "begins no conversation"),
        (TURN, "raise_exception('no such turn')", "no such turn"),
        (TURN, f"{TURN} | spell", "spell"),
    ],
)
def test_a_template_that_training_and_serving_would_read_otherwise_is_refused(
    old: str, new: str, says: str, tmp_path: Path
) -> None:
    rows = [("Be brief.", f"What is item {n} of the list?", f"It is {n}.") for n in range(20)]
    said = prepare(tmp_path, rows, old, new)
    assert (said.code, f"{says}" in said.err) == (1, True), said.err
    assert not (tmp_path / "data").exists()


def test_text_that_spells_a_control_token_stays_text(tmp_path: Path) -> None:
    spelled = "a <|eot_id|> b <|start_header_id|>system<|end_header_id|> c <|begin_of_text|>"
    rows = [
        ("s", f"{spelled} {n}" if n % 2 else f"u {n}", f"It is {n}. {spelled if n % 3 else ''}")
        for n in range(40)
    ]
    said = prepare(tmp_path, rows)
    assert said.code == 0, said.err
    control = set(AutoTokenizer.from_pretrained(tiny.base()).added_tokens_decoder)
    made = [row for part in frozen.PARTS for row in frozen.prepared(tmp_path / "data", part)]
    found = {tuple(token for token in row["input_ids"] if token in control) for row in made}
    assert len(made) > 20 and len(found) == 1, "every row has the template's control tokens alone"


def test_labels_of_every_real_row_decode_to_its_answers(shared: Path) -> None:
    sample = shared / "data" / "finance_instruct_sample.jsonl"
    tokenizer = load_tokenizer(Base("llama", "", shared / "tokenizers" / "llama3"))
    chat = ChatFormat(tokenizer, ChatConfig())
    rows = []
    for line in sample.read_bytes().split(b"\n")[:2500]:
        try:
            rows.append(to_messages(json.loads(line), None))
        except Rejected:
            continue
    assert any(len(row) > 3 for row in rows)
    for row, made in zip(rows, chat.encode_many(rows), strict=True):
        assert isinstance(made, list) and len(made) == 1
        encoded = made[0]
        kept = [label for label in encoded.labels if label != IGNORE_INDEX]
        answers = [message.content.strip() for message in row if message.role == "assistant"]
        assert chat.tokenizer.decode(kept, clean_up_tokenization_spaces=False) == "".join(
            f"{answer}<|eot_id|>" for answer in answers
        )
        assert encoded.input_ids.count(chat.tokenizer.bos_token_id) == 1


HEAD = "{{ bos_token }}{% for m in messages %}"
"""Templates of our own, each with a trait of a family of bases."""
TAIL = "{% endfor %}{% if add_generation_prompt %}"
PLAIN = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' + m['content'] }}"
THINKS = (
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' }}"
    "{% if m['role'] == 'assistant' and (loop.last or not drops) %}"
    "{{ '<think>' + (m['reasoning_content'] or '') + '</think>' }}{% endif %}"
    "{{ m['content'] + '<|eot_id|>' }}"
)
ASKS = "<|start_header_id|>assistant<|end_header_id|>"
TEMPLATES = {
    "the next role's token ends a turn": HEAD + PLAIN + TAIL + ASKS + "{% endif %}",
    "history drops thoughts": "{% set drops = true %}" + HEAD + THINKS + TAIL + ASKS
    + "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}",
    "the prompt opens a thought": HEAD + PLAIN + "<|eot_id|>" + TAIL + ASKS
    + "<think>\n{% endif %}",
    "a system text moves to the last question": "{% set lead = messages[0]['role'] == 'system' %}"
    + HEAD + "{% if m['role'] != 'system' %}" + "{{ '<|start_header_id|>' + m['role'] }}"
    "{{ '<|end_header_id|>' + (messages[0]['content'] if lead and loop.last and m['role'] == 'user'"
    " else '') + m['content'] + '<|eot_id|>' }}{% endif %}" + TAIL + ASKS + "{% endif %}",
    "no system text": HEAD + "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}" + PLAIN + "<|eot_id|>" + TAIL + ASKS + "{% endif %}",
    "texts as parts": HEAD + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' }}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}<|eot_id|>" + TAIL + ASKS
    + "{% endif %}",
}  # fmt: skip
TURNS = [
    Message("system", "Be brief."),
    Message("user", "What is EBIT?"),
    Message("assistant", "Earnings before interest and taxes."),
    Message("user", "In <|eot_id|> figures?"),
    Message("assistant", "It is 12.5 %.", thought="Look it up."),
]
WANTED = {
    "the next role's token ends a turn": ("<|start_header_id|>", 1, ""),
    "history drops thoughts": ("<|eot_id|>", 2, "<think>Look it up.</think>"),
    "the prompt opens a thought": ("<|eot_id|>", 2, "Look it up.\n</think>\n\n"),
    "a system text moves to the last question": ("<|eot_id|>", 2, ""),
    "no system text": ("<|eot_id|>", 1, ""),
    "texts as parts": ("<|eot_id|>", 1, ""),
}
"""What ends a turn, the examples of TURNS, and what is trained before its last answer."""


@pytest.mark.parametrize("trait", TEMPLATES)
def test_a_template_is_read_by_what_it_renders(trait: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.base())
    tokenizer.chat_template = TEMPLATES[trait]
    chat = ChatFormat(tokenizer, ChatConfig()).for_rows([TURNS])
    end, examples, lead = WANTED[trait]
    (made,) = chat.encode_many([TURNS])
    assert isinstance(made, list) and len(made) == examples, made
    trained = [label for one in made for label in one.labels if label != IGNORE_INDEX]
    earlier = "\n</think>\n\n" if trait == "the prompt opens a thought" else ""
    if trait == "history drops thoughts":
        earlier = "<think></think>"
    answers = f"{earlier}{TURNS[2].content}{end}{lead}{TURNS[4].content}{end}"
    assert tokenizer.decode(trained) == answers
    prompt = chat.prompt_ids(TURNS)
    assert made[-1].input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt) == chat.template.render(TURNS[:-1], prompt=True), (
        "what a server renders"
    )
    control = [token for token in prompt if tokenizer.decode(token) == "<|eot_id|>"]
    assert len(control) < 5 and chat.stop_token_ids[-1] in {*trained, tokenizer.eos_token_id}


def test_an_answer_is_read_behind_its_thought_and_a_cut_thought_is_none() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.base())
    tokenizer.chat_template = TEMPLATES["history drops thoughts"]
    chat = ChatFormat(tokenizer, ChatConfig(thinking="keep"))
    texts = ("<think>It is 4.</think>\n\n5", "<think>It is 4.", "5 < 6", "<thing> 5")
    wanted = [("5", False), ("", True), ("5 < 6", False), ("<thing> 5", False)]
    for text, answer in zip(texts, wanted, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert chat.answer([*ids, tokenizer.eos_token_id]) == answer
        reader = chat.reader()
        pieces = [reader.feed(character) for character in text]
        assert ("".join(pieces) + reader.finish()).strip() == answer[0], "streamed by the character"


def test_calls_of_tools_are_trained_where_the_template_writes_them(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.base())
    call = [{"function": {"name": "price", "arguments": '{"of": "ACME"}'}}]
    row = {
        "tools": [{"type": "function", "function": {"name": "price", "parameters": {}}}],
        "messages": [
            {"role": "user", "content": "What is the price of ACME?"},
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "tool", "content": "12.5"},
            {"role": "assistant", "content": "It is 12.5."},
        ],
    }
    messages = to_messages(row, None)
    (refused,) = ChatFormat(tokenizer, ChatConfig()).encode_many([messages])
    assert isinstance(refused, Refused) and refused.reason == "template"
    tokenizer.chat_template = (
        "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' }}{% if m['tool_calls'] %}"
        "{{ m['tool_calls'][0]['function'] | tojson }}{% else %}{{ m['content'] }}{% endif %}"
        "<|eot_id|>" + TAIL + ASKS + "{% endif %}"
    )
    (made,) = ChatFormat(tokenizer, ChatConfig()).encode_many([messages])
    assert isinstance(made, list)
    trained = [label for one in made for label in one.labels if label != IGNORE_INDEX]
    written = '{"name": "price", "arguments": {"of": "ACME"}}'
    assert tokenizer.decode(trained) == f"{written}<|eot_id|>It is 12.5.<|eot_id|>"
