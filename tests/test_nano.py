"""The bundled base and sample rows: size, tokenizer, chat wire format, and the rows' bytes.

Runs in a few seconds; nothing is trained. The comparison with the published Llama 3.1 template
needs `../shared/tokenizers/llama3` and says so when it is absent.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny import ROOT
from transformers import AutoTokenizer

from build_nano.rows import write_rows
from build_nano.tokenizer import LLAMA3_PATTERN, SPECIAL_TOKENS, VOCAB_SIZE

NANO = ROOT / "src" / "fintune" / "nano"
BASE = NANO / "base"
LLAMA3 = ROOT.parent / "shared" / "tokenizers" / "llama3"

SYSTEM = {"role": "system", "content": " You are a financial analyst.\n"}
USER = {"role": "user", "content": "\nWhat is EBITDA? "}
ASSISTANT = {"role": "assistant", "content": "Earnings before interest and tax. "}
CONVERSATIONS = (
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT],
    [SYSTEM, USER, ASSISTANT, USER],
    [SYSTEM, {"role": "user", "content": "日本語 <|eot_id|> é\n\n  🙂"}],
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def test_base_is_small() -> None:
    files = list(BASE.glob("*.safetensors"))
    assert len(files) == 1
    assert files[0].stat().st_size <= 12_000_000
    with safe_open(files[0], "pt") as weights:
        sizes = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        assert {part.get_dtype() for part in sizes.values()} == {"BF16"}
        shapes = [part.get_shape() for part in sizes.values()]
    assert sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes) <= 6_000_000
    assert "lm_head.weight" not in sizes  # tied


def test_base_configuration(tokenizer: Any) -> None:
    config = json.loads((BASE / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == tokenizer.model_max_length == 2048
    generation = json.loads((BASE / "generation_config.json").read_text())
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    assert generation["eos_token_id"] == stops
    assert (generation["do_sample"], generation["temperature"], generation["top_p"]) == (
        True,
        0.6,
        0.9,
    )


def test_special_tokens_end_the_vocabulary(tokenizer: Any) -> None:
    first = VOCAB_SIZE - len(SPECIAL_TOKENS)
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(first, VOCAB_SIZE))
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"


@pytest.mark.parametrize(
    "text",
    [
        "Revenue was $1,284 million (12.5%).\r\n\tIt'S up.",
        "営業収入は512百万円 — прибыль, ¿qué?",
        "🙂\u200d\u0301 \x00\x07\x7f",
        "".join(map(chr, range(0x20, 0x250))),
        "   leading,   inner and trailing   \n\n\n",
    ],
)
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_plain_text_gets_bos_and_no_token_types(tokenizer: Any) -> None:
    encoded = tokenizer("Revenue rose.")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in encoded["input_ids"][1:]


def test_pre_tokenizer_is_llama3s(tokenizer: Any) -> None:
    own = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    assert own["pre_tokenizer"] == loaded["pre_tokenizer"]
    split, byte_level = own["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": LLAMA3_PATTERN}
    assert split["behavior"] == "Isolated"
    assert byte_level["use_regex"] is byte_level["add_prefix_space"] is False
    assert own["model"]["ignore_merges"] is True
    if (LLAMA3 / "tokenizer.json").exists():
        published = json.loads((LLAMA3 / "tokenizer.json").read_text(encoding="utf-8"))
        assert own["pre_tokenizer"] == published["pre_tokenizer"]


def test_chat_template_text(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template([SYSTEM, USER], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n"
        "You are a financial analyst.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "What is EBITDA?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chat_template_refuses_other_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([USER, {"role": "tool", "content": "1"}], tokenize=False)


@pytest.mark.skipif(not LLAMA3.exists(), reason=f"{LLAMA3} is absent")
def test_chat_template_equals_the_published_one(tokenizer: Any) -> None:
    published = AutoTokenizer.from_pretrained(LLAMA3)
    options: list[dict[str, Any]] = [{}, {"date_string": "1 Jan 2026"}]
    for messages, prompt, extra in itertools.product(CONVERSATIONS, (False, True), options):
        arguments = {"tokenize": False, "add_generation_prompt": prompt, **extra}
        assert tokenizer.apply_chat_template(
            messages, **arguments
        ) == published.apply_chat_template(messages, **arguments)


def test_rows_come_out_byte_for_byte(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == (NANO / "rows.jsonl").read_bytes()
    assert (NANO / "rows.jsonl").stat().st_size <= 3_000_000
