"""A Llama-shaped model or its LoRA adapter -> GGUF, the format of llama.cpp and Ollama.

The `gguf` package (extra `export`) writes the file, knows the tensor names and the vocabulary
fields; the mapping is here. Three things make a converted Llama answer wrongly, and each has a
line below: q and k rows are stored in another order, Llama 3.1 scales its rotary frequencies by a
table, and an adapter's B of q and k must follow the order of the weights it is added to.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import TokenType
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fintune.errors import ModelError
from fintune.gguf_base import CUTS
from fintune.model import Base, LoadedRelease
from fintune.untrusted.checks import ADAPTER, ADAPTER_CONFIG, read_object
from fintune.untrusted.probe import read_architecture

FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
NUMPY_TYPES = {"f32": np.float32, "f16": np.float16}
UNSUPPORTED_LORA = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")
_LORA_PREFIX = "base_model.model."


def write_model(loaded: LoadedRelease, path: Path, dtype: str, name: str) -> None:
    """Write a whole model.

    Args:
        loaded: a model without adapters; its base has the config.json and tokenizer.json.
        dtype: f32 or f16, for matrices; vectors stay f32, as llama.cpp wants them.
        name: of the model, for people.

    Raises:
        ModelError: a model that is not Llama-shaped.
    """
    config = _llama_config(loaded.base)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    _add_shape(writer, config)
    _add_vocabulary(writer, loaded.base, loaded.chat.tokenizer, config.vocab_size)
    names = _names(config)
    if (factors := rope_factors(config)) is not None:
        writer.add_tensor(names["rope_freqs"] + ".weight", factors)
    for source, weight in loaded.model.state_dict().items():
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp falls back on the embedding
        value = _in_gguf_order(source, weight.float(), config)
        kind = NUMPY_TYPES[dtype] if value.ndim > 1 else np.float32
        stem = names[source.removesuffix(".weight")]
        writer.add_tensor(f"{stem}.weight", value.numpy().astype(kind))
    _finish(writer)


def write_adapter(folder: Path, base: Base, path: Path, dtype: str) -> None:
    """Write a peft LoRA adapter for a base that is in GGUF already.

    Raises:
        ModelError: a kind of LoRA that llama.cpp does not have.
    """
    config, lora = _llama_config(base), read_object(folder, ADAPTER_CONFIG)
    if refused := [key for key in UNSUPPORTED_LORA if lora.get(key)]:
        fix = "export gguf --merged instead"
        raise ModelError(f"llama.cpp has no adapter with {', '.join(refused)}", fix=fix)
    # llama.cpp scales by alpha / rank; rsLoRA by alpha / sqrt(rank).
    alpha = lora["lora_alpha"] * (math.sqrt(lora["r"]) if lora.get("use_rslora") else 1.0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    names = _names(config)
    for source, weight in load_file(folder / ADAPTER).items():
        module, _, matrix = source.removeprefix(_LORA_PREFIX).rpartition(".lora_")
        kind = matrix.removesuffix(".weight").lower()
        value = weight.float()
        if kind == "b":  # [out, rank]: its rows are the weight's rows
            value = _in_gguf_order(f"{module}.weight", value, config)
        name = f"{names[module]}.weight.lora_{kind}"
        writer.add_tensor(name, value.numpy().astype(NUMPY_TYPES[dtype]))
    _finish(writer)


def permute(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from transformers' order to llama.cpp's, within each head; [out, in].

    transformers rotates the first half of a head against its second half, llama.cpp rotates
    neighbours, so row i of the first half and row i of the second become rows 2i and 2i + 1.
    """
    half = weight.shape[0] // heads // 2
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, half, *rest).swapaxes(1, 2).reshape(weight.shape).contiguous()


def _in_gguf_order(name: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    match = re.search(r"\.([qk])_proj\.weight$", name)
    return permute(weight, heads[match[1]]) if match else weight


def _llama_config(base: Base) -> PretrainedConfig:
    config = read_architecture(base.folder)
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        what = f"{base.id} is {config.model_type}-shaped; this export knows plain Llama only"
        raise ModelError(what, fix="export merged, and convert it with llama.cpp's own converter")
    return config


def _names(config: PretrainedConfig) -> gguf.TensorNameMap:
    """transformers' module name -> llama.cpp's."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)


def _add_shape(writer: Any, config: PretrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def rope_factors(config: PretrainedConfig) -> Any:
    """Llama 3.1's frequency divisors, an fp32 array [head / 2]; None where nothing is scaled.

    Raises:
        ModelError: any other scaling.
    """
    rope, head = config.rope_parameters, config.head_dim
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"rotary scaling {kind!r} is not known to this export")
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, head, 2) / head)
    return (plain / scaled).numpy()


def _add_vocabulary(writer: Any, base: Base, tokenizer: Any, size: int) -> None:
    """Byte-level BPE; places without a token are filled as unused.

    Raises:
        ModelError: a tokenizer that llama.cpp would cut otherwise.
    """
    tokens = [f"[unused{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for text, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = text, TokenType.NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(base, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special_ids = gguf.SpecialVocab(base.folder, load_merges=True, n_vocab=size)
    special_ids.chat_template = tokenizer.get_chat_template()
    special_ids.add_special_token["bos"] = adds_bos(tokenizer)
    special_ids.special_token_ids["eot"] = tokenizer.eos_token_id
    special_ids.special_token_ids["pad"] = tokenizer.pad_token_id
    special_ids.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(base: Base, tokenizer: Any) -> str:
    """llama.cpp's name of how a text is cut before BPE: of a base that was a GGUF file its own."""
    if cut := read_object(base.folder, "gguf.json", absent=True).get("cut"):
        return str(cut)
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    text = json.dumps([tree["model"].get("ignore_merges", False), tree["pre_tokenizer"]])
    for name, trait in CUTS["written"].items():
        if re.fullmatch(trait, text) and not tree["normalizer"]:
            return str(name)
    what = f"the tokenizer of {base.id} cuts texts in a way that this export does not know"
    raise ModelError(what, fix="export merged, and convert it with llama.cpp's own converter")


def adds_bos(tokenizer: Any) -> bool:
    """Whether a text is given a BOS, as llama.cpp then does by itself."""
    first = tokenizer.encode("a")[:1]
    return bool(first) and first[0] == tokenizer.bos_token_id


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
