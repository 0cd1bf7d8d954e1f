"""Merged weights against the adapter: `python tools/merged.py runs/demo/release`.

Prints the largest logit difference over 50 held-out questions in fp32 and how many of the 50 greedy
answers of 48 tokens, stop token left out so that none is short, are equal; written to
bench/results/merged.json.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fintune import console, files
from fintune.chat import ChatFormat
from fintune.config import ChatConfig
from fintune.example import Message
from fintune.generation import Request, generate
from fintune.model import load_release, read_tokenizer, release_base
from fintune.releasing.export import merged
from fintune.untrusted.checks import JUDGED

TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path, nargs="?", default=Path("runs/demo/release"))
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    base = release_base(options.release, options.base)
    tokenizer = read_tokenizer(options.release)
    chat = ChatFormat(tokenizer, ChatConfig())
    rows = files.read_jsonl(options.release / JUDGED)
    questions = [row["question"] for row in rows]
    prompts = [chat.prompt_ids([Message("user", question)]) for question in questions]
    adapter = load_release(options.release, base, dtype="fp32").model
    with tempfile.TemporaryDirectory() as folder:
        out = merged(options.release, Path(folder) / "merged", base=options.base, dtype="fp32")
        whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    worst = 0.0
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            gap = adapter(input_ids=ids).logits - whole(input_ids=ids).logits
            worst = max(worst, float(gap.abs().max()))
    texts = []
    for model in (adapter, whole):
        asked = [Request(str(number), ids, TOKENS) for number, ids in enumerate(prompts)]
        answers = generate(model, chat, asked, stop_token_ids=[], batch_size=25)
        texts.append({answer.id: answer.text for batch in answers for answer in batch})
    equal = sum(texts[0][key] == texts[1][key] for key in texts[0])
    found = {"largest_logit_difference": worst, "greedy_equal": equal, "of": len(prompts),
             "distinct_answers": len(set(texts[0].values()))}  # fmt: skip
    files.write_json(Path(__file__).parents[1] / "bench" / "results" / "merged.json", found)
    console.emit_json(found)


if __name__ == "__main__":
    main()
