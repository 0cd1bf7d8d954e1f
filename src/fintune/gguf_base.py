"""A GGUF file as a base: read once by transformers, kept as safetensors in the user's cache.

The bytes are a stranger's: the header is read in a child with limits, its sizes are held against
the file and against the model that it describes. Where transformers would read a file wrongly
without a word (another cut of the text, another rotation, biases), it is read rightly or refused.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.gguf import reader
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fintune import files
from fintune.console import say
from fintune.errors import ModelError, failing, needing
from fintune.untrusted.probe import probe_base, run_limited

FACTS = "gguf.json"
"""What a kept folder says of the file that it was read from."""
MOST_FP32 = 10**9
"""Parameters up to which weights are kept in fp32, which is exact; a larger base in bf16, as a GPU
computes: 8B would take 32 GB."""
CUTS = files.read_toml(__file__, "gguf.toml")
"""How llama.cpp cuts texts."""
_OTHER = "download it again, or use the base's safetensors"


@dataclass(frozen=True, slots=True)
class Kept:
    """The folder of a base that was read from a GGUF file, that file's sha256, and what became of
    its weights ("dequantised from Q4_1")."""

    folder: Path
    sha256: str
    about: str


def find_kept(sha256: str) -> Kept | None:
    """What was read of a file before, if it is still there; None also for what is no sha256."""
    folder = files.cache_dir() / "gguf" / sha256
    if not re.fullmatch("[0-9a-f]{64}", sha256) or not (folder / FACTS).is_file():
        return None
    return Kept(folder, sha256, str(files.read_json(folder / FACTS)["about"]))


def read(path: Path) -> Kept | None:
    """A base from a GGUF file, or from a folder that holds one and no config.json; else None.

    It is read once, later calls take what is kept; two processes that want it wait for each other.

    Raises:
        ModelError: no GGUF, cut, one of several, without a tokenizer; or an architecture, type or
            tokenizer that transformers does not read, or would not read rightly.
        OutputError: the cache cannot be written. GateRefused: reading it exceeded a limit.
        NoSpace: too little disk for the weights.
    """
    if (file := _file(path)) is None:
        return None
    sha256 = files.cached_sha256(file)
    if kept := find_kept(sha256):
        return kept
    facts = run_limited(lambda: _facts(file), file.name)
    folder = files.cache_dir() / "gguf" / sha256
    with files.reaching(folder, fix="set XDG_CACHE_HOME to a folder that can be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f".{sha256}.lock")):
        if not find_kept(sha256):  # nor by another process meanwhile
            size = facts["elements"] * getattr(torch, facts["dtype"]).itemsize
            files.require_free_space(folder, size + files.SMALL_FILES)
            say(f"reading {file.name}: {facts['elements'] / 1e6:,.1f} M parameters, once")
            with files.staged_folder(folder) as staging:
                _convert(file, facts, staging)
                files.write_json(staging / FACTS, {"about": facts["about"], "cut": facts["cut"]})
    return find_kept(sha256)


def _file(path: Path) -> Path | None:
    """The GGUF file that a path means; None where it is absent, or a folder of another kind."""
    found = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if len(found) > 1:
        what = f"{path} holds {len(found)} GGUF files"
        raise ModelError(what, fix=f"name one: model.path={found[0]}")
    return next((file for file in (*found, path) if file.is_file()), None)


def _facts(file: Path) -> dict[str, Any]:
    """What the header says, held against the file; no weight is read. Runs in the child.

    Raises:
        ModelError: with what is wrong.
    """
    counts, places = Counter[str](), dict[str, int]()
    with needing("export", "reading a GGUF file"):
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    # Exception: whatever a cut header makes struct and numpy raise.
    with failing(f"{file.name} cannot be read as GGUF", Exception, fix=_OTHER):
        blob = reader._mapped(str(file))
        metadata, count, at = reader._read_metadata(blob, file.name)
        tensors, at = reader._read_tensor_table(blob, count, at)
        align, end = int(metadata.get("general.alignment", 32)), 0
        for name, shape, number, offset in tensors:
            stored = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[stored]
            places[name] = -(-at // align) * align + offset
            counts[stored.name] += math.prod(shape)
            end = max(end, places[name] + math.prod(shape) // block * size)
    kind, scaling = str(metadata["general.architecture"]), "rope.scaling.type"
    cut, model = metadata.get("tokenizer.ggml.pre"), metadata.get("tokenizer.ggml.model")
    scaled = kind != "gpt-oss" and metadata.get(f"{kind}.{scaling}", "none") != "none"
    known = model != "gpt2" or cut in (*GGUF_PRE_TOKENIZER_SPLITS, *CUTS["gpt2"], *CUTS["digits"])
    for wrong, what in (
        (end > len(blob), f"is cut: it has {len(blob):,} bytes, its header names {end:,}"),
        (metadata.get("general.type", "model") != "model", "is no model"),
        (metadata.get("split.count", 1) > 1, "is one part of several: merge them with llama.cpp"),
        (model is None, "holds no tokenizer"),
        (int(metadata.get(f"{kind}.block_count", 0)) > len(tensors), "has too few tensors"),
        (not known, f"cuts texts as {cut!r}, which transformers does not know"),
        (scaled or any("rope_factors" in name for name in places), "scales its rotation"),
    ):
        if wrong:
            raise ModelError(f"{file.name} {what}", why="it cannot be read rightly", fix=_OTHER)
    types = [name for name, _ in counts.most_common() if name != "F32"]
    small, plain = counts.total() <= MOST_FP32, {*types} <= {"F16", "BF16"}
    about = f"{'read' if plain else 'dequantised'} from {[*types, 'F32'][0]}"
    return {
        "about": about if small else f"{about} to bf16",
        "elements": counts.total(),
        "dtype": "float32" if small else "bfloat16",
        "cut": cut if model == "gpt2" else None,
        "ends": [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")],
        "biases": any(name.endswith(".bias") for name in places),
        "rotation": places.get("rope_freqs.weight"),
    }


def _convert(file: Path, facts: dict[str, Any], staging: Path) -> None:
    """Write configuration, tokenizer, weights and stop tokens as transformers reads them.

    Raises:
        ModelError: it does not read them, or not all of them.
    """
    place: Any = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    errors = (OSError, ValueError, RuntimeError, LookupError, TypeError)
    with failing(f"{file.name} cannot be read", *errors, fix=_OTHER):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
        _recut(tokenizer.backend_tokenizer, facts["cut"])
        tokenizer.save_pretrained(staging)
        config = AutoConfig.from_pretrained(file.parent, **place)
        if facts["rotation"]:
            _restore_rotation(file, facts["rotation"], config)
        config.save_pretrained(staging)
        probe_base(staging, weights=True)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        if empty.num_parameters() > 1.01 * facts["elements"]:
            raise ValueError("it describes a larger model than it holds")
        packed, dtype = GgufConfig(dequantize=True), getattr(torch, facts["dtype"])
        place |= {"quantization_config": packed, "output_loading_info": True, "dtype": dtype}
        model, info = AutoModelForCausalLM.from_pretrained(file.parent, config=config, **place)
        biases = any(name.endswith("bias") for name, _ in model.named_parameters())
        lost = [*info["missing_keys"], *(["biases"] if facts["biases"] and not biases else [])]
        if lost:
            raise ValueError(f"transformers reads it without {', '.join(lost[:3])}")
    model.generation_config.eos_token_id = sorted({*facts["ends"]} - {None})
    model.save_pretrained(staging)


def _recut(backend: Any, cut: str | None) -> None:
    """Cut texts as llama.cpp does for this file, where transformers would not."""
    if cut in CUTS["digits"]:
        parts = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if cut in CUTS["whole"]:
        backend.model.ignore_merges = True


def _restore_rotation(file: Path, offset: int, config: Any) -> None:
    """Llama 3.1's rotary scaling, of which the file holds the divisors and transformers none.

    Raises:
        ValueError: divisors of another scaling.
    """
    stated = np.fromfile(file, "<f4", config.head_dim // 2, offset=offset)
    plain = 1 / config.rope_parameters["rope_theta"] ** (np.arange(len(stated)) / len(stated))
    config.rope_parameters |= {"factor": float(stated.max()), **CUTS["rope"]}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if not np.allclose(plain / scaled.numpy(), stated, rtol=1e-3):
        raise ValueError("its rotary divisors are not those of Llama 3.1")
