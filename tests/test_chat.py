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
from fintune.example import IGNORE_INDEX
from fintune.model import Base, load_tokenizer

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
