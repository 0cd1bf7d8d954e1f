"""The shape of a base, and what follows from it exactly: parameters, adapter, sizes of files.

Built in are the public shapes of common bases, so that a gated one needs no account to be planned
for; `tests/test_plan.py` holds their parameter counts against the published ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintune import nano
from fintune.config import LoraConfig, ModelConfig
from fintune.errors import ConfigError, ModelError
from fintune.files import read_json, read_toml


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of the Llama family.

    Attributes:
        hidden, intermediate: widths of the residual stream and of the gated MLP.
        heads, kv_heads, head_dim: query heads, key and value heads, width of one.
        tied: the output layer is the embedding.
        qkv_bias: Qwen2's bias of the query, key and value projections.
        qk_norm: Qwen3's norms of queries and keys.
        joined: Phi-3's single matrices for q, k, v and for gate, up.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    joined: bool = False

    @property
    def q(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block: name -> (in, out)."""
        h, i, q, kv = self.hidden, self.intermediate, self.q, self.kv
        if self.joined:
            qkv, up = {"qkv_proj": (h, q + 2 * kv)}, {"gate_up_proj": (h, 2 * i)}
        else:
            qkv = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv)}
            up = {"gate_proj": (h, i), "up_proj": (h, i)}
        return {**qkv, "o_proj": (q, h), **up, "down_proj": (i, h)}

    @property
    def linear(self) -> int:
        """Weights of the blocks' linear layers: what quantisation packs."""
        return self.layers * sum(a * b for a, b in self.projections.values())

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of the base."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        biases = self.q + 2 * self.kv if self.qkv_bias else 0
        block = self.layers * (norms + biases)
        return self.linear + block + self.hidden + self.head * (1 if self.tied else 2)

    def adapted(self, lora: LoraConfig) -> dict[str, tuple[int, int]]:
        """Projections of one block that get an adapter.

        Raises:
            ConfigError: a target that this base does not have.
        """
        missing = [name for name in lora.target_modules if name not in self.projections]
        if missing:
            raise ConfigError(
                f"train.lora.target_modules: this base has no {', '.join(missing)}",
                fix=f"it has {', '.join(self.projections)}",
            )
        return {n: s for n, s in self.projections.items() if n in lora.target_modules}

    def trainable(self, lora: LoraConfig) -> int:
        """Parameters of the adapter (without biases)."""
        return self.layers * lora.r * sum(a + b for a, b in self.adapted(lora).values())

    def adapter_tensors(self, lora: LoraConfig) -> dict[str, tuple[int, int]]:
        """Tensors of `adapter_model.safetensors`, by peft's names."""
        tensors = {}
        for layer in range(self.layers):
            for name, (inner, outer) in self.adapted(lora).items():
                gated = name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
                place = "mlp" if gated else "self_attn"
                stem = f"base_model.model.model.layers.{layer}.{place}.{name}"
                tensors[f"{stem}.lora_A.weight"] = (lora.r, inner)
                tensors[f"{stem}.lora_B.weight"] = (outer, lora.r)
        return tensors


def safetensors_bytes(tensors: dict[str, tuple[int, int]]) -> int:
    """Size of a safetensors file of fp32 tensors: 8 bytes, a JSON header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + 4 * tensors[name][0] * tensors[name][1]
        header[name] = {"dtype": "F32", "shape": tensors[name], "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + end


SHAPES = {name: Shape(**facts) for name, facts in read_toml(__file__, "shapes.toml").items()}
"""By the end of the public id, in lower case, without `meta-` and `-instruct`."""


def find_shape(model: ModelConfig) -> Shape:
    """The shape of a config's base: of its folder where it is on this machine, else built in.

    Raises:
        ModelError: neither.
    """
    folder = nano.base_dir() if model.id == nano.NANO_ID and model.path is None else model.path
    if folder is not None:
        return read_shape(folder / "config.json")
    name = model.id.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    shape = SHAPES.get(name) or SHAPES.get(name.removesuffix("-instruct"))
    if shape is None:
        raise ModelError(
            f"the shape of {model.id} is not built in",
            fix=f"set model.path to a folder with its config.json; built in: {', '.join(SHAPES)}",
        )
    return shape


def read_shape(path: Path) -> Shape:
    """The shape that a transformers config.json describes."""
    if not path.is_file():
        raise ModelError(f"no {path.name} in {path.parent}", fix="model.path is the base's folder")
    facts = read_json(path)
    kind = facts.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3", "phi3"):
        raise ModelError(
            f"{path}: plans are made for llama, mistral, qwen2, qwen3 and phi3, this is {kind}",
            fix="fintune train --dry-run shows what is known without a plan",
        )
    heads, hidden = facts["num_attention_heads"], facts["hidden_size"]
    return Shape(
        vocab=facts["vocab_size"],
        hidden=hidden,
        intermediate=facts["intermediate_size"],
        layers=facts["num_hidden_layers"],
        heads=heads,
        kv_heads=facts.get("num_key_value_heads") or heads,
        head_dim=facts.get("head_dim") or hidden // heads,
        tied=facts.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        joined=kind == "phi3",
    )
