"""A byte-level BPE tokenizer of our own with Llama 3's pre-tokenizer, special tokens and chat wire
format.

The pattern and the special tokens are Llama 3's so that llama.cpp's `llama-bpe` pre-tokenizer
splits text into the same ids; the vocabulary is trained on `prose` alone. Downstream code meets the
same traps as with the real tokenizer: the template writes BOS itself and always opens with a system
block.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fintune.nano import base_dir

VOCAB_SIZE: Final = 4096
MAX_LENGTH: Final = 2048
BOS: Final = "<|begin_of_text|>"
END: Final = "<|end_of_text|>"
EOM: Final = "<|eom_id|>"
EOT: Final = "<|eot_id|>"
PAD: Final = "<|finetune_right_pad_id|>"
SPECIAL_TOKENS: Final = (BOS, END, "<|start_header_id|>", "<|end_header_id|>", EOM, EOT, PAD)

# Llama 3's split: words take one preceding blank or mark, digits come in groups of at most three
# from the left.
LLAMA3_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3.1's wire format. The two date lines come first in the system block, also without a system
# message. A new base takes it over from the bundled one.
CHAT_TEMPLATE: Final = (base_dir() / "chat_template.jinja").read_text("utf-8")


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the vocabulary: 256 byte symbols first, then merges, the special tokens last."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    # Plain `tokenizer("text")` puts BOS in front, as Llama 3 does; rendered chats must be encoded
    # without it.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    names = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    config = names | {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
