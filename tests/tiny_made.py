"""A tiny base with a tokenizer of its own, raw rows and benchmark questions, all made by a seed.

python tests/tiny_made.py     prints their folder; they are made on first use
"""

import contextlib
import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@cache
def folder() -> Path:
    """The cache: a folder whose name says what made it, so that none is ever stale."""
    made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    place = ROOT / "runs" / f"tiny-{made_by}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=place.parent, prefix=".tiny-"))
        building.chmod(0o755)
        _write_base(building / "base")
        (building / "rows.jsonl").write_bytes("".join(line for line, _ in _raw_rows()).encode())
        (building / "questions.jsonl").write_text("".join(_questions()), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was faster
            building.rename(place)
        shutil.rmtree(building, ignore_errors=True)
    return place


def base() -> Path:
    """Folder of the tiny base."""
    return folder() / "base"


def rows() -> Path:
    """Raw rows, JSON Lines."""
    return folder() / "rows.jsonl"


def planted() -> dict[int, str]:
    """Line -> the reason for which a raw row must be dropped, whatever the caps are."""
    return {line: reason for line, (_, reason) in enumerate(_raw_rows(), start=1) if reason}


def questions() -> Path:
    """A benchmark of 110 labelled sentences, as `tasks` of an evaluation."""
    return folder() / "questions.jsonl"


# ---- the base --------------------------------------------------------------------------------

BOS, EOS, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|right_pad|>"
HEADER, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
SPECIAL = (BOS, EOS, HEADER, HEADER_END, EOT, PAD)
VOCABULARY, WIDE = 512, 2048
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"
# As Llama 3 cuts text: a word takes one blank or mark before it, digits come in threes.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{%- set lead = messages[0]['role'] == 'system' -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' -}}
{{- (date_string if date_string is defined else '26 Jul 2024') + '\\n\\n' -}}
{{- (messages[0]['content'] | trim if lead else '') + '<|eot_id|>' -}}
{%- for message in (messages[1:] if lead else messages) -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def _write_base(place: Path) -> None:
    """A Llama of 380,000 parameters. Its weights are bytes of Python's own generator, scaled by
    powers of two, so they are the same on every machine and under every torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    place.mkdir()
    _write_tokenizer(place)
    ids = {token: VOCABULARY - len(SPECIAL) + at for at, token in enumerate(SPECIAL)}
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=ids[BOS],
        eos_token_id=[ids[EOS], ids[EOT]],
        pad_token_id=ids[PAD],
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    model = LlamaForCausalLM(shape)
    chance = random.Random(22)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                whole = torch.frombuffer(
                    bytearray(chance.randbytes(weight.numel())), dtype=torch.int8
                )
                # Within 1/4 (1/2 for embeddings): far from uniform logits, so that no near tie
                # makes a greedy answer depend on rounding.
                scale = 2.0 ** (-8 if "embed" in name else -9)
                weight.copy_(whole.view_as(weight) * scale)
    model.save_pretrained(place)


def wide_base(place: Path) -> Path:
    """A Llama of 0.3 M parameters, drawn as transformers does it, whose tokenizer knows the words
    of the sample rows: they are about as long as under a real one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fintune.sample import rows_path

    place.mkdir(parents=True)
    lines = rows_path().read_text(encoding="utf-8").splitlines()[:400]
    texts = [str(text) for line in lines for text in json.loads(line).values()]
    _write_tokenizer(place, [re.sub(r"\d{4,}", " ", text) for text in texts], WIDE)
    config = LlamaConfig.from_pretrained(base())
    ends = [WIDE - len(SPECIAL) + SPECIAL.index(token) for token in (BOS, EOS, EOT, PAD)]
    config.update(
        {"vocab_size": 2 * WIDE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    )
    config.update({"bos_token_id": ends[0], "eos_token_id": ends[1:3], "pad_token_id": ends[3]})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def _write_tokenizer(place: Path, texts: list[str] | None = None, size: int = VOCABULARY) -> None:
    """Byte-level BPE: 256 bytes, the merges of texts (else of those below), special tokens last."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chance = random.Random(1)
    own = [text for _ in range(60) for make in MAKERS for text in make(chance)]
    # A digit is a token and so is a month: two dates are equally long, as they are to Llama 3.
    own = [re.sub(r"\d", " ", text) for text in own] + 200 * [f"Today Date: {MONTHS} "]
    tokenizer.train_from_iterator(texts or own, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    assert tokenizer.get_vocab_size() == size
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    names = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    facts = names | {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (place / "tokenizer_config.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (place / "special_tokens_map.json").write_text(json.dumps(names, indent=1), encoding="utf-8")


# ---- rows ------------------------------------------------------------------------------------

FIRST = ("Alder", "Birch", "Cobalt", "Dunmore", "Elmfield", "Fairway", "Granite", "Harrow")
SECOND = ("Bank", "Energy", "Foods", "Motors", "Shipping", "Software", "Steel", "Textiles")
EVENTS = {
    "positive": ("raised its dividend", "won a large order", "lifted its forecast for the year"),
    "negative": ("cut its dividend", "lost its largest customer", "warned of lower profit"),
    "neutral": (
        "moved its head office",
        "filed its annual report",
        "named the date of its meeting",
    ),
}
TERMS = {
    "EBITDA": "earnings before interest, taxes, depreciation and amortization",
    "a bond": "a loan that can be traded, with a fixed date of repayment",
    "free cash flow": "operating cash flow less capital expenditure",
    "the payout ratio": "the share of net income that is paid as dividends",
}


def _company(chance: random.Random) -> str:
    return f"{chance.choice(FIRST)} {chance.choice(SECOND)}"


def _number(chance: random.Random) -> tuple[str, str]:
    name, year = _company(chance), chance.randrange(2011, 2024)
    old, new, costs = (chance.randrange(40, 900) for _ in range(3))
    asked = chance.choice((year, year + 1))
    text = (
        f"{name} reported revenue of ${old} million in {year} and ${new} million in {year + 1}. "
        f"Costs were ${costs} million in {year + 1}. What was the revenue of {name} in {asked}?"
    )
    return text, f"${old if asked == year else new} million"


def _tone(chance: random.Random) -> tuple[str, str]:
    label = chance.choice(sorted(EVENTS))
    month, share = chance.choice(("May", "June", "July", "August")), chance.randrange(2, 60)
    text = (
        f"{_company(chance)} {chance.choice(EVENTS[label])} in {month}; the company employs"
        f" {chance.randrange(200, 9000)} people and makes {share}% of its sales abroad.\n"
        "What is the tone of this news? Options: positive, negative, neutral"
    )
    return text, label


def _term(chance: random.Random) -> tuple[str, str]:
    term = chance.choice(sorted(TERMS))
    who = f"{_company(chance)} with {chance.randrange(20, 900)} readers"
    text = f"Please explain {term} in one sentence for the staff magazine of {who}."
    return text, f"{term[0].upper()}{term[1:]} is {TERMS[term]}."


MAKERS = (_number, _tone, _term)


def _questions() -> Iterator[str]:
    chance = random.Random(3)
    for number in range(110):
        text, label = _tone(chance)
        yield json.dumps({"id": number, "prompt": text, "answer": label}) + "\n"


def _shaped(at: int, text: str, answer: str) -> dict[str, Any]:
    """A row in one of five formats."""
    lead = "You are a careful assistant for finance questions."
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return (
        {"user": text, "assistant": answer},
        {"system": lead, "user": text, "assistant": answer},
        {"instruction": "Answer the question.", "input": text, "output": answer},
        {"messages": [{"role": "system", "content": lead}, *turns]},
        {"prompt": text, "completion": answer},
    )[at % 5]


def _bad_rows(chance: random.Random) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows that are whole JSON objects, and the reason for which each must be dropped."""
    parts = "; ".join(f"quarter {n} ${n * 7} million" for n in range(1, 90))
    mail = "Write to jane.roe@example.com about the revenue of Alder Bank in 2019, please, today."
    phone = "Call 202-555-0143 to hear what a bond of Birch Steel pays in a year."
    german = (
        "Wie hoch war der Umsatz der Gesellschaft im vergangenen Jahr, und woran lag das genau?"
    )
    russian = "Какова была выручка компании в прошлом году и почему она так сильно изменилась?"
    asked = [_number(chance)[0] for _ in range(3)]
    for user, assistant, reason in (
        ("Hi", "Ho", "too_short"),
        ("Thanks.", "Welcome.", "too_short"),
        (f"Revenue: {parts}. What is the sum?", "$28,035 million", "too_long"),
        (german, "Der Umsatz stieg auf zwölf Millionen Euro.", "not_english"),
        (russian, "Она выросла на двенадцать процентов.", "not_english"),
        (mail, "The revenue of Alder Bank was $12 million.", "personal_data"),
        (phone, "A bond of Birch Steel pays $40 a year.", "personal_data"),
        (asked[0], "", "no_assistant"),
        ("", "The revenue was $12 million in 2019.", "no_user"),
        (asked[1], "nan", "boilerplate"),
        (asked[2], "I'm sorry, but I cannot assist.", "refusal"),
        ("What was the revenue of {{company}} in 2019?", "$3 million", "placeholder"),
        (12 * ["x"], "$3 million", "not_text"),
    ):
        yield {"user": user, "assistant": assistant}, reason
    for role, text, reason in (
        ("oracle", "What was it?", "unknown_role"),
        ("assistant", "It was $3 million.", "turns_out_of_order"),
    ):
        yield {"messages": [{"role": role, "content": text}]}, reason
    yield {"alpha": "What was it?", "beta": "$3 million"}, "unknown_columns"


@cache
def _raw_rows() -> tuple[tuple[str, str], ...]:
    """Raw lines, each with the reason for which it must be dropped, or an empty text."""
    chance = random.Random(2)
    good = [_shaped(at, *MAKERS[at % 3](chance)) for at in range(130)]
    made = [(json.dumps(row) + "\n", "") for row in good]
    made += [(json.dumps(row) + "\n", reason) for row, reason in _bad_rows(chance)]
    made += [("this line is no JSON\n", "not_json"), ("[1, 2]\n", "not_an_object")]
    # Of equal rows the first stays; of one input with two labels neither.
    made += [(made[at][0], "duplicate") for at in (0, 3, 6)]
    text, label = _tone(chance)
    other = next(name for name in EVENTS if name != label)
    torn = [{"user": text, "assistant": said} for said in (label, other)]
    made += [(json.dumps(row) + "\n", "contradictory_labels") for row in torn]
    made.append((json.dumps({"user": "cut off", "assistant": "in the mid"})[:-6], "not_json"))
    return tuple(made)


if __name__ == "__main__":
    sys.stdout.write(f"{folder()}\n")
