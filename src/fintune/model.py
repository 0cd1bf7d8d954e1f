"""Base and adapter: where the files are, loading, precision, quantisation, device."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from fintune import attention, console, cpu, gguf_base, seal
from fintune.chat import ChatFormat
from fintune.config import LOCAL, ChatConfig, LoraConfig, ModelConfig
from fintune.errors import ConfigError, ModelError, OutputError, failing
from fintune.files import cached_sha256, read_json, sha256_bytes
from fintune.hub import COMMIT, resolve
from fintune.targets import Targets, find_targets
from fintune.untrusted import checks, probe
from fintune.untrusted.checks import CONFIG, LIMITS, PROVENANCE, WEIGHTS_INDEX, Check, Report
from fintune.untrusted.probe import probe_base, probe_release, read_tokenizer, stop_token_ids
from fintune.untrusted.static import open_folder

PrecisionName = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError)
"""What transformers and peft raise for files that they cannot take."""
disable_progress_bar()  # loading a base has a line of ours

WEIGHTS = re.compile(r"[0-9a-f]{64}")
"""A `Base.revision` that is no commit of the hub."""
SMALL_FILES = (*LIMITS["loaded_json"], *LIMITS["loaded_files"])
"""What is read of a base but its weights."""
_RELEASE_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")
LICENCES = ("LICENSE*", "USE_POLICY*")
WEIGHT_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Base:
    """A base model on this machine: its public name and the folder that holds it.

    `revision` is a commit of the hub, the sha256 of a local base's weights, or that of the GGUF
    file that it was read from; `named` is the branch, tag or commit of the config that it was
    resolved from first; `read_as` says what became of a GGUF file's weights.
    """

    id: str
    revision: str
    folder: Path
    named: str | None = None
    read_as: str = ""

    @property
    def about(self) -> str:
        """What exactly the base is, in words: a commit, or which file has the sha256."""
        if self.read_as:
            name = self.id.rpartition("/")[2]
            return f"{name}, {self.read_as}, sha256 {self.revision} of the GGUF file"
        kind = "commit" if COMMIT.fullmatch(self.revision) else "sha256 of its weights"
        return f"{self.id}, {kind} {self.revision}"

    @property
    def record(self) -> dict[str, Any]:
        """What a stage records, so that the next one takes the same commit."""
        return {"id": self.id, "revision": self.revision, "named": self.named}


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def precision(choice: str, on: torch.device) -> PrecisionName:
    """Resolve `auto`: bf16 where the device has it (a CPU: where faster), else fp16 or fp32."""
    if choice == "fp16" and on.type == "cpu":
        what = "fp16 on a CPU: its gradient scaler works on CUDA only"
        raise ModelError(what, fix="--set train.precision=auto")
    if choice != "auto":
        return choice  # type: ignore[return-value]
    if on.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    # With avx512_bf16 alone a bf16 product takes a third of fp32's time on an EPYC, 1.8 on a Xeon.
    has = torch.cpu.get_capabilities()
    amd = str(has.get("cpu_name")).startswith("AMD")
    return "bf16" if has.get("avx512_bf16" if amd else "amx_bf16") else "fp32"


def find_base(config: ModelConfig, *, weights: bool = True, kept_in: Iterable[Path] = ()) -> Base:
    """Find a base on disk or fetch it from the hub.

    Args:
        weights: also the weights; without them only configuration and tokenizer are fetched.
        kept_in: folders of stages. The commit that the first of them recorded for this base is
            the one, unless the config has named another revision since.

    Raises:
        ConfigError: none is named.
        ModelError: missing, gated, without weights, or with code hooks in its configuration; a
            GGUF file as `gguf_base.read` says.
        NoSpace: too little disk for the weights.
    """
    if not config.id:
        raise ConfigError("no base is named", fix="set model.id (a hub id), or model.path")
    kept = seal.recorded_base(kept_in, config.id)
    stated = config.revision or str(kept.get("revision"))  # of a GGUF file, wherever it lies now
    read = gguf_base.read(config.path) if config.path else gguf_base.find_kept(stated)
    folder = read.folder if read else config.path or _fetch(config, weights, kept)
    if not (folder / "config.json").exists():
        state = "config.json is missing" if folder.is_dir() else "no folder"
        raise ModelError(f"{state} at {folder}", fix="check model.path")
    _check_once(folder, weights)
    if weights and (lacks := [n for n in _weight_files(folder) if not (folder / n).is_file()]):
        why = "pickled weights (.bin, .pt) are never read"
        raise ModelError(f"{folder} holds no weights {', '.join(lacks[:3])}", why=why)
    commit = folder.name if folder.parent.name == "snapshots" else None
    revision = read.sha256 if read else commit or config.revision or weights_sha256(folder)
    named = kept["named"] if kept.get("revision") == revision else config.revision
    return Base(config.id, revision, folder, named, read.about if read else "")


@cache
def _check_once(folder: Path, weights: bool) -> None:
    """A base is checked once in a process."""
    for check in open_folder(folder, "base"):
        if check.status == "note" and check.name == "code hooks":
            console.warn(f"{folder.name}: {check.detail}")
    probe_base(folder, weights=weights)


def _fetch(config: ModelConfig, weights: bool, kept: dict[str, Any]) -> Path:
    """Bring into the hub's cache what is loaded and not there yet: no other format, no folders."""
    same = config.revision in (None, kept.get("named"))
    commit = kept["revision"] if same and COMMIT.fullmatch(kept.get("revision", "")) else None
    name = kept["named"] if commit else config.revision
    hub = resolve("model", config.id, name, setting="model.path", recorded=commit)
    top = [name for name in hub.files() if "/" not in name]
    folder = hub.fetch([name for name in top if name in SMALL_FILES])
    with suppress(ModelError):  # a release of a Llama base asks for it; nothing else does
        hub.fetch([name for name in top if any(fnmatch(name, each) for each in LICENCES)])
    # The index is a text of others: its names are no patterns, and only those listed are fetched.
    shards = _weight_files(folder, top).intersection(top) if weights else set[str]()
    return hub.fetch([glob.escape(name) for name in shards])


def _weight_files(folder: Path, top: Iterable[str] | None = None) -> set[str]:
    """The files that transformers takes the weights of a base from.

    Args:
        top: names of a repository, of which the folder need not hold all yet.
    """
    there = {path.name for path in folder.iterdir()} if top is None else {*top}
    shards = checks.read_object(folder, WEIGHTS_INDEX, absent=True).get("weight_map")
    if WEIGHT_FILE in there or not isinstance(shards, dict):
        return {WEIGHT_FILE}
    return {*map(str, shards.values())}


def weights_sha256(folder: Path) -> str:
    """The sha256 of a base's weights (of several files: of their hashes)."""
    hashes = [cached_sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else sha256_bytes("".join(hashes).encode())


def find_release(name: Path) -> Path:
    """The folder of a release: `name` itself, or the cached snapshot of a hub id.

    An id may end with `@` and a branch, tag or commit. Nothing is fetched from a repository that
    holds other files than a release.

    Raises:
        GateRefused: it holds other files. OutputError: no such repository (see `hub.hub_error`).
    """
    given = _RELEASE_ID.fullmatch(str(name))
    if given is None or name.exists():
        return name
    repository = resolve("model", given[1], given[2], setting="release")
    names = repository.files().keys() - checks.HUB_FILES
    checks.refuse(
        f"{repository.id} holds what no release does:", names - {*LIMITS["release_names"]}
    )
    console.say(f"{repository.id} at commit {repository.commit}")
    return repository.fetch(sorted(names))


def open_release(folder: Path, base: Path | None) -> Base:
    """Check a release, or any adapter of peft with a tokenizer, and find its base.

    Args:
        base: folder or GGUF file of the base; absent: as `release_base` finds it.

    Raises:
        OutputError: no adapter there.
        GateRefused: a check failed (`untrusted`), or the adapter is of another base.
        ModelError: the base is not on this machine and cannot be fetched.
    """
    if not (folder / checks.ADAPTER_CONFIG).exists():
        raise OutputError(f"{folder} holds no adapter (adapter_config.json)", fix="fintune release")
    report = Report(folder)
    ours = (folder / checks.SUMS).exists()
    report.checks += open_folder(folder, "release" if ours else "adapter")
    named = release_base(folder, base)
    report.run(lambda: check_on_base(folder, named))
    report.settle()
    return named


def release_base(folder: Path, base: Path | None) -> Base:
    """The base that a checked release names, with the revision its weights really have.

    Args:
        base: folder or GGUF file of the base; absent: what is kept of the GGUF file that it was
            trained on, else the hub's by id and revision.

    Raises:
        ModelError: trained on a GGUF file that is not kept here, or on a folder: no hub has it.
    """
    config = checks.read_object(folder, checks.ADAPTER_CONFIG)
    name = str(config.get("base_model_name_or_path"))
    stated = checks.read_object(folder, CONFIG, absent=True).get(PROVENANCE) or {}
    # No revision for a local folder: it is named by its weights, so that another base shows.
    revision = None if base else config.get("revision")
    if base is None and (stated.get("base_read_as") or name.startswith(LOCAL)):
        revision = str(stated.get("base_sha256"))
        if not gguf_base.find_kept(revision):
            what = f"{folder.name} was trained on {stated.get('base') or name}, which is not here"
            raise ModelError(what, fix="name its file or folder: --base PATH")
    return find_base(ModelConfig(id=name, path=base, revision=revision))


def check_on_base(folder: Path, base: Base) -> Iterator[Check]:
    """The adapter was trained on these weights, as far as the folder says it, and fits them."""
    yield checks.ask("base", _same_revision, folder, base)
    yield from probe_release(folder, base.folder)


def _same_revision(folder: Path, base: Base) -> str:
    adapter = checks.read_object(folder, checks.ADAPTER_CONFIG)
    provenance = checks.read_object(folder, CONFIG, absent=True).get(PROVENANCE) or {}
    # A commit, or the sha256 of a local base's weights; releases of 0.2 have it as `revision`.
    trained = str(adapter.get("revision") or provenance.get("base_sha256") or "")
    if len(trained) != len(base.revision):
        return checks.Note(f"{base.id}; trained on {trained[:12] or 'an unknown revision'}")
    if trained != base.revision:
        revisions = f"{trained[:12]}, this base is {base.revision[:12]}"
        raise checks.Unreadable(f"trained on another base (revision {revisions})")
    return f"{base.id} at {trained[:12]}"


def load_tokenizer(base: Base) -> Any:
    """The base's fast tokenizer, with a padding token that is not its end of turn.

    Padding with the end-of-turn token would hide every true end of turn from a loss that
    ignores padding; Llama 3 keeps `<|finetune_right_pad_id|>` free for this.
    """
    tokenizer = read_tokenizer(base.folder)
    if not tokenizer.is_fast:
        raise ModelError(f"{base.id} has no fast tokenizer (tokenizer.json)")
    named = checks.read_object(base.folder, "tokenizer_config.json", absent=True)
    older = named.get("chat_template")
    if isinstance(older, str) and older.strip() != str(tokenizer.chat_template).strip():
        console.warn(
            f"{base.id} has two chat templates: chat_template.jinja counts,"
            " tokenizer_config.json holds another, which older loaders take"
        )
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        known = tokenizer.get_vocab()
        spare = (t for t in ("<|finetune_right_pad_id|>", "<|fim_pad|>", "<unk>") if t in known)
        tokenizer.pad_token = next(spare, tokenizer.eos_token)
    return tokenizer


def prepared_chat(data: Path, settings: ChatConfig) -> ChatConfig:
    """The chat settings that prepared data were made with: `auto` is decided there."""
    manifest = data / "manifest.json"
    recorded = read_json(manifest).get("chat") if manifest.exists() else None
    return ChatConfig(**recorded["settings"]) if recorded else settings


def load_chat(base: Base, settings: ChatConfig, data: Path | None = None) -> ChatFormat:
    """The base's tokenizer with its chat template.

    Args:
        data: folder of the stage `prepare`, which decides what the settings leave open.

    Raises:
        ModelError: no tokenizer, or no template that can be trained on.
    """
    if data is not None:
        settings = prepared_chat(data, settings)
    tokenizer = load_tokenizer(base)
    return ChatFormat(tokenizer, settings, stop_token_ids(base.folder, tokenizer))


def load_base(base: Base, quantization: str, dtype: PrecisionName, *, on_cpu: bool = False) -> Any:
    """Load the base's weights onto this process's device, frozen, with the attention that it can
    have (`attention.traits`). Of a multimodal checkpoint the text part is used.

    Args:
        quantization: none, 8bit or 4bit (bitsandbytes; nf4 with double quantisation).
        dtype: precision of what is not quantised.
        on_cpu: leave it in the machine's memory, to be taken apart from there.

    Raises:
        ModelError: it does not load, or the files lack weights of the model.
    """
    # Of 1,024 compiled products, 3 MB each, oneDNN needs 512 for collate.CPU_PAD_MULTIPLE's sizes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
    packed = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    kind = probe.model_class(probe.read_architecture(base.folder))
    again = "download it again"
    with failing(f"the base in {base.folder} does not load", *_UNLOADABLE, fix=again):
        model, info = kind.from_pretrained(
            base.folder,
            dtype=DTYPES[dtype],
            device_map={"": "cpu" if on_cpu else device()},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            quantization_config=None if quantization == "none" else packed,
            output_loading_info=True,
        )
    if lacks := sorted(info["missing_keys"]):
        what = f"the weights in {base.folder} lack {console.some(lacks)} of {type(model).__name__}"
        why = "transformers would fill them with random numbers"
        raise ModelError(what, why=why, fix=again)
    model.requires_grad_(False)
    attention.traits(model)
    cpu.speed_up_linear(model)
    return model


def attach(model: Any, config: LoraConfig, seed: int, targets: Targets | None = None) -> PeftModel:
    """Put a fresh adapter on a base: peft's initialisation, seeded, fp32 weights.

    Args:
        targets: what gets an adapter; absent: found on the model.

    Raises:
        ModelError: a target module that the base does not have.
    """
    torch.manual_seed(seed)
    targets = targets or find_targets(model, config.target_modules)
    names = {"target_modules": sorted(targets.modules), "exclude_modules": targets.exclude}
    settings = PeftLoraConfig(**config.model_dump() | names, bias="none", task_type="CAUSAL_LM")
    fix = "name other layers: train.lora.target_modules"
    with failing("peft puts no adapter on this base", ValueError, fix=fix):
        peft = get_peft_model(model, settings, autocast_adapter_dtype=True)
    for name, value in vars(peft.active_peft_config).items():
        if isinstance(value, set):  # saved in its order, which is another in every process
            setattr(peft.active_peft_config, name, sorted(value))
    return peft


def load_adapter(model: Any, folder: Path) -> PeftModel:
    """Put a saved adapter on a base, for inference."""
    with failing(f"the adapter in {folder} does not load", *_UNLOADABLE):
        peft = PeftModel.from_pretrained(model, folder, is_trainable=False)
    cpu.speed_up_linear(peft)
    return peft.eval()


def adapter_set(peft_model: PeftModel, on: bool) -> Any:
    """A context in which the adapter is on, or off, so that the base answers."""
    return nullcontext() if on else peft_model.disable_adapter()


def context_length(model: Any) -> int:
    """Tokens of prompt and answer that a base takes; without a bound (ALiBi, Mamba) very many."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))


def inference_dtype() -> PrecisionName:
    """bf16 where a GPU has it, else fp32."""
    on_gpu = device().type == "cuda" and torch.cuda.is_bf16_supported(False)
    return "bf16" if on_gpu else "fp32"


@dataclass(frozen=True, slots=True)
class LoadedRelease:
    """Base with adapter, ready for inference, and what a prompt of it is made with."""

    base: Base
    model: PeftModel
    dtype: PrecisionName
    chat: ChatFormat


def load_release(
    folder: Path,
    base: Base,
    *,
    dtype: PrecisionName | None = None,
    settings: ChatConfig | None = None,
) -> LoadedRelease:
    """Load a checked release, or any adapter of peft with a tokenizer, on its base.

    Args:
        dtype: precision of the base; None: `inference_dtype`.
        settings: of the chat template; None: the release's, or the defaults.

    Raises:
        ModelError: base, adapter or tokenizer does not load.
    """
    dtype = dtype or inference_dtype()
    tokenizer = read_tokenizer(folder if probe.has_tokenizer(folder) else base.folder)
    golden = checks.read_object(folder, checks.FIXTURE, absent=True)
    settings = settings or ChatConfig(**golden.get("chat", {}).get("settings", {}))
    model = load_adapter(load_base(base, "none", dtype), folder)
    stops = stop_token_ids(base.folder, tokenizer)
    return LoadedRelease(base, model, dtype, ChatFormat(tokenizer, settings, stops))
