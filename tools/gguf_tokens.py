"""GGUF files of a release in llama.cpp: `make test-gguf`, or with llama-cpp-python at hand

    python tools/gguf_tokens.py runs/demo/release

Exports merged f32, merged f16, and the adapter beside its base, and counts on how many of 20
held-out questions llama.cpp's greedy tokens are those of transformers with peft in fp32. Prints
that and writes bench/results/gguf.json. (Not called gguf.py: it would hide the package.)
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp

from fintune import console, files
from fintune.chat import ChatFormat
from fintune.example import Message
from fintune.generation import Request, generate
from fintune.model import load_base, load_release, release_base
from fintune.releasing import export, gguf
from fintune.untrusted.checks import JUDGED

QUESTIONS, TOKENS = 20, 48


def said(llama: Any, ids: list[int], ends: list[int]) -> list[int]:
    """llama.cpp's greedy tokens, up to and with its first end token."""
    made = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        made.append(token)
        if token in ends or len(made) == TOKENS:
            break
    return made


def greedy(model: Any, chat: ChatFormat, prompts: list[list[int]], ends: list[int]) -> list[Any]:
    """Our greedy tokens, in the order of the prompts."""
    asked = [Request(f"{number:03}", ids, TOKENS) for number, ids in enumerate(prompts)]
    parts = generate(model, chat, asked, stop_token_ids=ends, batch_size=1)
    return [answer.token_ids for answer in sorted(sum(parts, []), key=lambda answer: answer.id)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path, nargs="?", default=Path("runs/demo/release"))
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    fixture = files.read_json(options.release / "prompt_fixture.json")
    base = release_base(options.release, options.base)
    rows = list(files.read_jsonl(options.release / JUDGED))[:QUESTIONS]
    prompts = [[Message("user", row["question"])] for row in rows]
    loaded = load_release(options.release, base, dtype="fp32")
    model, chat, ends = loaded.model, loaded.chat, fixture["end_token_ids"]
    ids = [chat.prompt_ids(messages) for messages in prompts]
    wanted = greedy(model, chat, ids, ends)
    with model.disable_adapter():
        plain = greedy(model, chat, ids, ends)
    found: dict[str, Any] = {
        "questions": len(rows),
        "tokens": sum(map(len, wanted)),
        "distinct_answers": len(set(map(tuple, wanted))),
        "answers_other_than_the_base": sum(a != b for a, b in zip(wanted, plain, strict=True)),
        "llama_cpp_python": llama_cpp.__version__,
        "equal": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for dtype in ("f32", "f16"):
            export.gguf(options.release, root / f"{dtype}.gguf", base=options.base, dtype=dtype,
                        merged=True)  # fmt: skip
        export.gguf(options.release, root / "adapter.gguf", base=options.base, dtype="f32")
        plain = replace(loaded, model=load_base(base, "none", "fp32"))
        gguf.write_model(plain, root / "base.gguf", "f32", "base")
        forms = {
            "merged f32": ("f32", None),
            "merged f16": ("f16", None),
            "adapter on base f32": ("base", str(root / "adapter.gguf")),
        }
        for name, (file, lora) in forms.items():
            llama = llama_cpp.Llama(
                str(root / f"{file}.gguf"), lora_path=lora, n_ctx=1024, n_threads=1,
                verbose=False,
            )  # fmt: skip
            same_ids = sum(
                llama.tokenize(
                    chat.render(messages, prompt=True).encode(), add_bos=False, special=True
                )
                == row
                for messages, row in zip(prompts, ids, strict=True)
            )
            equal = sum(
                said(llama, row, ends) == want for row, want in zip(ids, wanted, strict=True)
            )
            found["equal"][name] = {"prompt_ids": same_ids, "greedy_tokens": equal}
    files.write_json(Path(__file__).parents[1] / "bench" / "results" / "gguf.json", found)
    console.emit_json(found)


if __name__ == "__main__":
    main()
