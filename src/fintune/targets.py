"""Which layers of a base get an adapter: by default every linear layer of its text decoder.

For a Llama those are the seven names of the published recipe. Left out, and said: experts (peft
adapts the 3-D parameters of transformers 5 only without dropout, and by a copy of all of them),
routers, whose choice a low-rank noise would change first, and the mixers of Mamba and of short
convolutions, whose kernels read weights past the adapter's forward. What lies outside the decoder
(output layer, embeddings, vision and audio towers) is never touched.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from fintune.config import Config
from fintune.errors import ModelError
from fintune.untrusted.probe import empty_model, read_architecture

ALL_LINEAR = "all-linear"
_IN_LAYER = re.compile(r".*?\.?\d+\.(.+)")
"""A module of a decoder layer; its name inside the layer."""
_ROUTERS = {"gate", "router", "shared_expert_gate", "altup"}


@dataclass(frozen=True, slots=True)
class Targets:
    """What gets an adapter.

    Attributes:
        modules: names for peft, each the end of a module's path.
        exclude: pattern of the modules that the names would also fit, or None.
        without: weights of the decoder that get none, by their name in a layer, and why.
    """

    modules: tuple[str, ...]
    exclude: str | None
    without: dict[str, str]

    def __str__(self) -> str:
        return f"LoRA on {', '.join(self.modules)}; {_said(self.without)}"


def resolve_targets(base: Path, config: Config) -> tuple[Config, Targets]:
    """The config with `train.lora.target_modules` by name, and what they are.

    Args:
        base: folder of the base, whose weights are not read.

    Raises:
        ModelError: a name that fits no linear layer of the base's decoder.
    """
    lora = config.train.lora
    found = find_targets(empty_model(read_architecture(base)), lora.target_modules)
    lora = lora.model_copy(update={"target_modules": found.modules})
    train = config.train.model_copy(update={"lora": lora})
    return config.model_copy(update={"train": train}), found


def find_targets(model: Any, asked: Sequence[str]) -> Targets:
    """Resolve `train.lora.target_modules` on a model, which may be on the meta device.

    Args:
        model: a causal language model without an adapter.
        asked: names, each the end of a module's path; or `all-linear` alone.

    Raises:
        ModelError: a name that fits no linear layer of the decoder, or none can have an adapter.
    """
    decoder, every = model.get_decoder(), list(asked) == [ALL_LINEAR]
    place = next(name for name, module in model.named_modules() if module is decoder)
    reasons = dict(_weights(model, decoder))
    free = [name for name, reason in reasons.items() if not reason]
    missing = [a for a in asked if not every and not any(_fits(name, a) for name in free)]
    chosen = [name for name in free if every or any(_fits(name, a) for a in asked)]
    if missing or not chosen:
        _refuse(missing or [ALL_LINEAR], free, reasons)
    reasons |= {n: "not in train.lora.target_modules" for n in free if n not in chosen}
    prefix = f"{place}." if place else ""
    modules = _shortened(chosen, [name for name, _ in decoder.named_modules()], prefix)
    others = [name for name, _ in model.named_modules() if not name.startswith(prefix)]
    shared = any(_fits(other, name) for other in others for name in modules)
    without = {_in_layer(name): reason for name, reason in reasons.items() if reason}
    return Targets(modules, rf"(?!{re.escape(prefix)}).*" if shared else None, without)


def _weights(model: Any, decoder: Any) -> Iterator[tuple[str, str]]:
    """Linear layers, convolutions and experts of a decoder, each with why it gets no adapter."""
    renamed = cache(partial(_is_renamed, model))
    for name, weight in decoder.named_parameters():
        path, _, key = name.rpartition(".")
        owner = decoder.get_submodule(path)
        ends = owner is model.get_output_embeddings() or isinstance(owner, torch.nn.Embedding)
        if ends or weight.ndim < 2 or (key != "weight" and weight.ndim == 2):
            continue
        reason = _why_left(decoder, path, owner)
        if not reason and renamed(path.rpartition(".")[2]):
            reason = "peft takes the name for an expert's"
        yield path if key == "weight" else name, reason


def _why_left(decoder: Any, path: str, owner: Any) -> str:
    """Why a weight gets no adapter; empty where it does."""
    parts = path.split(".")
    parent = decoder.get_submodule(".".join(parts[:-1]))
    if not _IN_LAYER.fullmatch(path):
        return "outside the layers"
    if "experts" in parts:
        return "experts"
    if _ROUTERS.intersection(parts) or "Router" in type(owner).__name__:
        return "router"
    if hasattr(parent, "A_log") and hasattr(parent, "D"):
        return "Mamba"
    convolves = any(isinstance(child, torch.nn.Conv1d) for child in parent.children())
    if isinstance(owner, torch.nn.Conv1d) or (convolves and not hasattr(parent, "A_log")):
        return "convolution"
    plain = isinstance(owner, torch.nn.Linear)
    return "" if plain else f"of a kind that peft does not know: {type(owner).__name__}"


def _is_renamed(model: Any, leaf: str) -> bool:
    """Whether peft would put the adapter elsewhere: in models with fused experts it reads
    gate_proj, up_proj and down_proj as theirs, also where a dense layer has them."""
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return True
    return leaf not in (config.target_modules or ())


def _shortened(chosen: list[str], names: list[str], prefix: str) -> tuple[str, ...]:
    """The shortest ends of paths that fit the chosen modules of a decoder and no other."""
    kept, others = dict[str, None](), set(names) - set(chosen)
    for short in dict.fromkeys(map(_in_layer, chosen)):
        parts = short.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        if end := next((e for e in ends if not any(_fits(n, e) for n in others)), None):
            kept[end] = None
        else:
            kept |= {prefix + name: None for name in chosen if _in_layer(name) == short}
    return tuple(kept)


def _refuse(missing: Sequence[str], free: list[str], reasons: dict[str, str]) -> None:
    has = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in free))
    what = f"train.lora.target_modules: {', '.join(missing)} fits no linear layer of the decoder"
    why = _said({_in_layer(name): reason for name, reason in reasons.items() if reason})
    fix = f"name some of {has}, or {ALL_LINEAR}" if free else "choose another base"
    raise ModelError(what, why=why, fix=fix)


def _said(without: dict[str, str]) -> str:
    """What gets no adapter, by reason."""
    names = {reason: [n for n in without if without[n] == reason] for reason in without.values()}
    said = [f"{', '.join(left)} ({reason})" for reason, left in names.items()]
    return f"no adapter on {'; '.join(said)}" if said else "every linear layer of the decoder"


def _fits(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _in_layer(name: str) -> str:
    match = _IN_LAYER.fullmatch(name)
    return match[1] if match else name
