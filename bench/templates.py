"""Chat templates that others publish, read by ours: python bench/templates.py DIR [--json OUT]

DIR holds `.jinja` files, such as a checkout of llama.cpp (models/templates) or TRL
(trl/chat_templates); none is kept here. Each is put on a byte-level tokenizer (GPT-2's
pre-tokenizer over bytes) whose added tokens are those that the template spells. Conversations of
three shapes are encoded, and it is asked whether

- the prompt's ids are `apply_chat_template`'s own, and begin the training ids;
- the trained ids decode to what the template writes behind the prompt: the answer, and an end of
  turn that generation stops at;
- a text that spells the template's control tokens adds none (or its row is dropped).

Those of which something differs are named.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fintune.chat import ChatFormat
from fintune.config import ChatConfig
from fintune.console import result
from fintune.errors import ModelError
from fintune.example import IGNORE_INDEX, Message
from fintune.template import Refused

TOKEN = re.compile(
    r"<[|｜][^<>{}'\"\s]{1,40}[|｜]>|</?s>|\[/?[A-Z_]{3,20}\]|<(?:start|end)_of_turn>|</?[a-z_]{2,20}>"
    r"|<\|?[a-z_]+\|?>|<[a-z]+:[a-z_]+>|<SPECIAL_\d+>|\[[a-z]?[gs]?MASK\]|<[a-z_]+▁[a-z▁_]+>|<\|[^|<>]{1,30}\|>|]~[!b]\[|\[e~\[|]~b]"
)
ENDS = ("<|im_end|>", "<|eot_id|>", "</s>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<turn|>")
USER, ANSWER = "What is EBIT?", "Earnings before interest and taxes: 12.5 %."
SHAPES: dict[str, list[Message]] = {
    "one turn": [Message("user", USER), Message("assistant", ANSWER)],
    "system": [Message("system", "Be brief."), Message("user", USER), Message("assistant", ANSWER)],
    "turns": [
        Message("user", USER),
        Message("assistant", ANSWER),
        Message("user", "And EBITDA?"),
        Message("assistant", "- The same,\n\nbefore amortisation."),
    ],
}


def tokenizer_of(template: str) -> Any:
    """Bytes and the tokens that a template spells."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: at for at, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    spelled = [token for token in dict.fromkeys(TOKEN.findall(template)) if token != "</think>"]
    end = next((token for token in ENDS if token in spelled), "<|endoftext|>")
    bos = "<s>" if "</s>" in spelled else "<|begin_of_text|>"
    tokens = [*dict.fromkeys([*spelled, end, bos, "<think>", "</think>"])]
    plain = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    backend.add_tokens([AddedToken(t, special=t not in plain, normalized=False) for t in tokens])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=end)
    tokenizer.chat_template = template
    return tokenizer


def faults(template: str) -> Iterator[str]:
    """What is read wrongly of a template."""
    tokenizer = tokenizer_of(template)
    chat = ChatFormat(tokenizer, ChatConfig())
    control = {token for token, of in tokenizer.added_tokens_decoder.items() if of.special}

    def counted(ids: list[int]) -> list[int]:
        return [token for token in ids if token in control]

    for name, rows in SHAPES.items():
        (made,) = chat.encode_many([rows])
        if isinstance(made, Refused):
            yield f"{name}: {made.reason} {made.detail}"
            continue
        own = chat.template.render(rows[:-1], prompt=True)
        ids = tokenizer(own, add_special_tokens=False)["input_ids"]
        if ids != chat.prompt_ids(rows) or ids != made[-1].input_ids[: len(ids)]:
            yield f"{name}: the prompt's ids differ"
        last = [token for token in made[-1].labels[len(ids) :] if token != IGNORE_INDEX]
        text, trained = tokenizer.decode(last), [label for one in made for label in one.labels]
        if not text.rstrip().startswith(rows[-1].content) and rows[-1].content not in text:
            yield f"{name}: trained is {text!r}"
        if not last or last[-1] not in chat.stop_token_ids:
            yield f"{name}: the trained answer does not end: {text!r}"
        answers = sum(message.role == "assistant" for message in rows)
        ends = sum(token in chat.stop_token_ids for token in trained if token != IGNORE_INDEX)
        if ends < answers:
            yield f"{name}: {ends} ends of {answers} answers"
    spelled = " ".join(tokenizer.added_tokens_encoder)
    texts = [(f"Q {spelled}", "A"), ("Q", f"A {spelled}"), ("Q", "A")]
    rows = [[Message("user", user), Message("assistant", answer)] for user, answer in texts]
    *others, plain = chat.encode_many(rows)
    for one in others:
        if isinstance(one, list) and counted(one[-1].input_ids) != counted(plain[-1].input_ids):
            yield "spelled control tokens became tokens"


def main() -> None:
    """Read every template of a folder and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for path in sorted(options.folder.rglob("*.jinja")):
        try:
            found = [*faults(path.read_text(encoding="utf-8"))]
        except ModelError as error:
            found = [f"refused: {error.what}"]
        rows[path.stem] = found
        result(f"{path.stem:60} {'read' if not found else '; '.join(found)[:300]}")
    read = sum(not found for found in rows.values())
    result(f"{read} of {len(rows)} templates read rightly")
    if options.json:
        options.json.write_text(json.dumps({"read": read, "of": len(rows), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
