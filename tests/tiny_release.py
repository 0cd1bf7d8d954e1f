"""A tiny base with a random adapter, and the finished folders that `release` reads.

Real objects throughout: a two-layer Llama with the wire format of Llama 3, a peft
adapter whose B matrices are not zero, sealed folders. Built once a test module.
"""

import atexit
import contextlib
import functools
import json
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import tiny_made
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fintune import files, seal
from fintune.config import Config, dump_yaml
from fintune.releasing.bundle import release

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives


def tiny_base(folder: Path, seed: int = 0) -> Path:
    """A Llama of about 150,000 parameters, random by the seed, with the tiny base's tokenizer."""
    weights = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(tiny_made.base(), folder, ignore=weights)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [tokenizer.token_to_id(t) for t in ("<|end_of_text|>", "<|eot_id|>")]
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=ends,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        # Far from uniform logits: near ties would make greedy answers depend on rounding.
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@functools.cache
def built() -> tuple[Path, Path]:
    """One release and its base for all tests that only read it."""
    root = Path(tempfile.mkdtemp(prefix="tiny-release-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    base = tiny_base(root / "base")
    return release(tiny_run(root / "out", base)), base


def tiny_release(config: Config) -> Path:
    """The release of made folders, whose results do not follow from raw answers."""
    return release(config)


def tiny_adapter(
    base: Path, folder: Path, *, rank: int = 4, seed: int = 1, scale: float = 0.1
) -> Path:
    """A peft adapter on all seven projections, every matrix drawn at random."""
    model = LlamaForCausalLM.from_pretrained(base)
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(tiny.SEVEN_PROJECTIONS),
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, lora)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, scale)
    peft.save_pretrained(folder)
    return folder


def tiny_run(root: Path, base: Path, *, verdict: str = "better", **release: object) -> Config:
    """Finished data, run and eval folders of one config."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "out": root,
            "model": {"id": "fintune/tiny", "path": base},
            "data": {"source": str(root / "rows.jsonl")},
            "train": {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}},
            "release": {"samples": "text"} | release,
        }
    )
    _data(config.data_dir)
    tiny_adapter(base, config.run_dir / "best")
    files.write_text(config.run_dir / "config.yaml", dump_yaml(config))
    change = {"reason": "too high", "differs": ["config.train.learning_rate: 0.1 -> 0.01"]}
    facts = {
        "torch": "2.13.0",
        "seconds": 61.5,
        "accepted_changes": [change],
        "out_of_memory": [{"step": 7, "micro_batches": 8}],
    }
    files.write_json(config.run_dir / "environment.json", facts)
    files.write_json(
        config.run_dir / "training_arguments.json",
        {"output_dir": str(config.run_dir), "learning_rate": 1e-4, "bf16": True, "run_name": "x"},
    )
    train, test = (
        files.sha256_file(config.data_dir / f"{name}.parquet") for name in ("train", "test")
    )
    revision = files.sha256_file(base / "model.safetensors")
    seal.seal(config.run_dir, {"data": {"train.parquet": train}, "base": {"revision": revision}})
    adapter = files.sha256_file(config.run_dir / "best" / "adapter_model.safetensors")
    _evaluation(config.eval_dir, verdict)
    inputs = {"adapter": adapter, "train": train, "test": test}
    seal.seal(config.eval_dir, inputs)
    known = {"date": datetime.now(UTC).date().isoformat(), "inputs": files.sha256_json(inputs)}
    files.write_jsonl(config.data_dir / "evaluations.jsonl", [known])
    return config


def rewrite_sums(folder: Path) -> None:
    """Every hash that a folder states, as it is now: an attacker can do this too."""
    path = folder / "training_config.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        tree, before = json.loads(path.read_text()), files.sha256_file(path)
        for name in tree["files"].keys() & {
            found.name for found in folder.iterdir() if found.is_file()
        }:
            old, tree["files"][name] = tree["files"][name], files.sha256_file(folder / name)
            for key, digest in tree["provenance"].items():
                if digest == old:
                    tree["provenance"][key] = tree["files"][name]
        path.write_text(json.dumps(tree))
        card = folder / "README.md"
        if card.is_file():  # an attack may have put a FIFO there
            card.write_text(card.read_text().replace(before, files.sha256_file(path)))
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{files.sha256_file(folder / name)}  {name}\n" for name in names]
    files.write_text(folder / "SHA256SUMS", "".join(lines))


def _data(folder: Path) -> None:
    folder.mkdir(parents=True)
    kept = {"train": 5, "validation": 1, "test": 1}
    rows = {"read": 10, **kept, "dropped": {"too_short": 2, "empty": 1}}
    source = {"identity": "sha256:abc", "licence": "Apache-2.0", "read": 10, "train": 5}
    files.write_json(folder / "manifest.json", {"rows": rows, "sources": {"rows.jsonl": source}})
    for part, groups in (("train", ["a", "b"]), ("validation", ["c"]), ("test", ["d"])):
        pq.write_table(pa.table({"group": groups}), folder / f"{part}.parquet")
    seal.seal(folder, {})


def _evaluation(folder: Path, verdict: str) -> None:
    difference = {"value": 0.25, "ci95": [0.18, 0.32], "n": 240, "mde80": 0.07}
    files.write_json(
        folder / "test_results.json",
        {
            "verdict": verdict,
            "loss": {"base": 2.5, "adapter": 1.25},
            "n": {"contaminated": 0},
            "accuracy": {"base": 0.5, "adapter": 0.75, "difference": difference},
        },
    )
    files.write_json(folder / "run.json", {"repeated": []})
    for name in ("predictions.jsonl", "heldout.jsonl"):
        (folder / name).write_text("")
    row = {"status": "unscored", "unscored_reason": "no_judge", "key": "k"}
    asked = {"task": "rows:number", "question": "Sales: 4.\n\nHow much?", "reference": "4"}
    lines = [row, row | asked, row | asked | {"question": "Sales: 4. Say again: how much?"}]
    (folder / "eval_50_gpt_judged_raw.jsonl").write_text("\n".join(map(json.dumps, lines)))
