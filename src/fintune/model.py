"""Base and adapter: where the files are, loading, precision, quantisation, device."""

import functools
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from fintune import console, nano
from fintune.chat import ChatFormat
from fintune.config import ChatConfig, LoraConfig, ModelConfig
from fintune.errors import ModelError, NoSpace, OutputError
from fintune.files import free_bytes, read_json, remembered_sha256, sha256_bytes
from fintune.untrusted import Check, Report, checks, open_folder
from fintune.untrusted.probe import probe_base, probe_release, read_tokenizer, stop_token_ids
from fintune.untrusted.provenance import CONFIG, PROVENANCE

PrecisionName = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
disable_progress_bar()  # loading a base has a line of ours

COMMIT, WEIGHTS = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
"""What `Base.revision` is: a commit of the hub, or the sha256 of a local base's weights."""
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "LICENSE*"]
"""All of a hub base but its weights; no *.py: code of a hub is never run."""


@dataclass(frozen=True, slots=True)
class Base:
    """A base model on this machine: its public name and the folder that holds it."""

    id: str
    revision: str
    folder: Path


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def precision(choice: str, on: torch.device) -> PrecisionName:
    """Resolve `auto`: bf16 where the device has it (a CPU: where faster), else fp16 or fp32."""
    if choice == "fp16" and on.type == "cpu":
        raise ModelError(
            "precision fp16 on a CPU",
            why="the gradient scaler that fp16 needs works on CUDA only",
            fix="use --set train.precision=auto",
        )
    if choice != "auto":
        return choice  # type: ignore[return-value]
    if on.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    return "bf16" if _bf16_is_faster() else "fp32"


def _bf16_is_faster(size: int = 512, rounds: int = 3) -> bool:
    """Time a product in both precisions: bf16 is 4 times faster with AMX, slower when emulated."""
    best: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        best[dtype] = min(times[1:])
    return best[torch.bfloat16] < best[torch.float32]


def find_base(config: ModelConfig, *, weights: bool = True) -> Base:
    """Find a base on disk or fetch it from the hub.

    Args:
        weights: also the weights; without them only configuration and tokenizer are fetched.

    Raises:
        ModelError: missing, gated, without weights, or with code hooks in its configuration.
        NoSpace: too little disk for the weights.
    """
    if config.path is None and config.id == nano.NANO_ID:
        folder = nano.base_dir()
    elif config.path is not None:
        folder = config.path
        if not folder.is_dir():
            raise ModelError(f"model.path: no folder at {folder}", fix="give the base's folder")
    else:
        folder = _fetch(config, weights)
    _check_folder(folder, weights)
    commit = folder.name if folder.parent.name == "snapshots" else None
    revision = commit or config.revision or _weights_sha256(folder)
    return Base(config.id, revision, folder)


def trained_revision(folder: Path) -> str:
    """The base that a checked adapter was trained on: a commit of the hub, or its weights' sha256.

    Empty where neither is recorded. Releases of 0.2 have the sha256 as `revision`.
    """
    for name, keys in (
        (checks.ADAPTER_CONFIG, ("revision",)),
        (CONFIG, (PROVENANCE, "base_sha256")),
    ):
        value: Any = checks.read_object(folder, name) if (folder / name).exists() else {}
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str) and value:
            return value
    return ""


def open_release(folder: Path, base: Path | None) -> Base:
    """Check a release, or any adapter of peft with a tokenizer, and find its base.

    Args:
        base: folder of the base; absent: the bundled one, or the hub's by id and revision.

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
    found = release_base(folder, base)
    report.run(lambda: check_revision(folder, found))
    report.run(lambda: probe_release(folder, found.folder))
    report.settle()
    return found


def release_base(folder: Path, base: Path | None) -> Base:
    """The base that a checked release names, with the revision its weights really have.

    Args:
        base: folder of the base; absent: the bundled one, or the hub's by id and revision.
    """
    config = checks.read_object(folder, checks.ADAPTER_CONFIG)
    name = str(config.get("base_model_name_or_path"))
    # No revision for a local folder: it is named by its weights, so that another base shows.
    local = base is not None or name == nano.NANO_ID
    revision = None if local else config.get("revision")
    if revision and WEIGHTS.fullmatch(revision):  # releases of 0.2 have it; the hub knows none
        revision = None
    return find_base(ModelConfig(id=name, path=base, revision=revision))


def check_revision(folder: Path, base: Base) -> list[Check]:
    """The adapter was trained on these weights, as far as the release says it."""
    revision = trained_revision(folder)
    comparable = len(revision) == len(base.revision) and re.fullmatch("[0-9a-f]+", revision)
    if comparable and revision != base.revision:
        found = f"revision {revision[:12]}, this base is {base.revision[:12]}"
        return [Check("base", "failed", f"trained on another base ({found})")]
    if comparable:
        return [Check("base", "ok", f"{base.id} at {revision[:12]}")]
    note = f"trained on {revision[:12]}; not comparable with this folder"
    return [Check("base", "note", note if revision else f"{base.id}, revision not recorded")]


def _fetch(config: ModelConfig, weights: bool) -> Path:
    patterns = [*SMALL_FILES, "*.safetensors"] if weights else SMALL_FILES
    try:
        if weights:
            _check_room(config)
        path = huggingface_hub.snapshot_download(
            config.id, revision=config.revision, allow_patterns=patterns
        )
    except hub_errors.GatedRepoError:
        raise ModelError(
            f"{config.id} is gated: its licence must be accepted first",
            fix=f"accept it at https://huggingface.co/{config.id} and set HF_TOKEN to a read token",
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise ModelError(
            f"the hub knows no model {config.id}",
            fix="check model.id; a private or gated one needs HF_TOKEN; a local one model.path",
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise ModelError(f"{config.id} has no revision {config.revision}") from None
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{config.id} is not on this machine and the hub cannot be reached"
            f" ({type(error).__name__})",
            fix="check the network, or set model.path to a folder that holds it",
        ) from None
    return Path(path)


def _check_room(config: ModelConfig) -> None:
    info = huggingface_hub.model_info(config.id, revision=config.revision, files_metadata=True)
    sizes = [
        file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors")
    ]
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    needed, free = sum(sizes), free_bytes(cache)
    present = cache / f"models--{config.id.replace('/', '--')}" / "snapshots"
    if needed > free and not present.is_dir():
        raise NoSpace(
            f"{config.id} needs {needed / 1e9:.1f} GB, {cache} has {free / 1e9:.1f} GB free",
            fix="free some space, or point HF_HOME to another volume",
        )


def _check_folder(folder: Path, weights: bool) -> None:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} is no model folder: config.json is missing")
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no weights (*.safetensors)",
            why="pickled weights (.bin, .pt) are never read",
            fix="download the base again, or convert it to safetensors",
        )
    state = sorted((p.name, p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.iterdir())
    _check_once(folder, weights, tuple(state))


@functools.cache
def _check_once(folder: Path, weights: bool, state: tuple[tuple[str, int, int], ...]) -> None:
    """A base is checked once in a process, and again when its files change."""
    for check in open_folder(folder, "base"):
        if check.status == "note" and check.name == "code hooks":
            console.warn(f"{folder.name}: {check.detail}")
    probe_base(folder, weights=weights)


def _weights_sha256(folder: Path) -> str:
    """Name of a local base without a commit: its weights' sha256 (of several: of their hashes)."""
    hashes = [remembered_sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else sha256_bytes("".join(hashes).encode())


def load_tokenizer(base: Base) -> Any:
    """The base's fast tokenizer, with a padding token that is not its end of turn.

    Padding with the end-of-turn token would hide every true end of turn from a loss that
    ignores padding; Llama 3 keeps `<|finetune_right_pad_id|>` free for this.
    """
    tokenizer = read_tokenizer(base.folder)
    if not tokenizer.is_fast:
        raise ModelError(f"{base.id} has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        known = tokenizer.get_vocab()
        spare = (t for t in ("<|finetune_right_pad_id|>", "<|fim_pad|>", "<unk>") if t in known)
        tokenizer.pad_token = next(spare, tokenizer.eos_token)
    return tokenizer


def load_base(
    base: Base,
    quantization: str,
    dtype: PrecisionName,
    *,
    attention: str | None = None,
    on_cpu: bool = False,
) -> Any:
    """Load the base's weights onto this process's device, frozen.

    Args:
        quantization: none, 8bit or 4bit (bitsandbytes; nf4 with double quantisation).
        dtype: precision of what is not quantised.
        attention: transformers' name of the attention implementation.
        on_cpu: leave it in the machine's memory, to be taken apart from there.
    """
    # oneDNN keeps 1,024 compiled products by default, about 3 MB each; 512 serve the sizes that
    # collate.CPU_PAD_MULTIPLE leaves. Read at its first product; a user's own setting wins.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
    quantised: dict[str, Any] = {}
    if quantization == "4bit":
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    elif quantization == "8bit":
        quantised["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=DTYPES[dtype],
            device_map={"": "cpu" if on_cpu else device()},
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **quantised,
        )
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"the base in {base.folder} does not load: {str(error)[:300]}",
            fix="compare its files' checksums with the source, or download it again",
        ) from None
    model.requires_grad_(False)
    return model


def attach(model: Any, config: LoraConfig, seed: int) -> PeftModel:
    """Put a fresh adapter on a base: peft's initialisation, seeded, fp32 weights.

    Raises:
        ModelError: a target module that the base does not have.
    """
    torch.manual_seed(seed)
    try:
        peft = get_peft_model(model, peft_config(config), autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(
            f"train.lora.target_modules fit nothing in this base: {str(error)[:200]}",
            fix="name the base's own projections, such as q_proj, v_proj",
        ) from None
    for name, value in vars(peft.active_peft_config).items():
        if isinstance(value, set):  # saved in its order, which is another in every process
            setattr(peft.active_peft_config, name, sorted(value))
    for parameter in peft.parameters():  # biases are the base's own, in its precision
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
    return peft


def peft_config(config: LoraConfig) -> PeftLoraConfig:
    """peft's own configuration object for ours."""
    return PeftLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        target_modules=sorted(config.target_modules),
        task_type="CAUSAL_LM",
    )


def load_adapter(model: Any, folder: Path) -> PeftModel:
    """Put a saved adapter on a base, for inference."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is no adapter folder: {name} is missing")
    try:
        peft = PeftModel.from_pretrained(model, folder, is_trainable=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the adapter in {folder} does not load: {str(error)[:300]}") from None
    return peft.eval()


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
    stop_token_ids: list[int]


def load_release(
    folder: Path,
    base: Base,
    *,
    dtype: PrecisionName | None = None,
    date_string: str | None = None,
) -> LoadedRelease:
    """Load a checked release, or any adapter of peft with a tokenizer, on its base.

    Args:
        dtype: precision of the base; None: `inference_dtype`.
        date_string: date of the chat template; None: the release's own, or the default.

    Raises:
        ModelError: base, adapter or tokenizer does not load.
    """
    dtype = dtype or inference_dtype()
    tokenizer = read_tokenizer(folder)
    if date_string is None and (folder / checks.FIXTURE).is_file():
        date_string = read_json(folder / checks.FIXTURE)["date_string"]
    chat = ChatFormat(tokenizer, date_string or ChatConfig().date_string)
    model = load_adapter(load_base(base, "none", dtype), folder)
    return LoadedRelease(base, model, dtype, chat, end_token_ids(base, tokenizer))


def end_token_ids(base: Base, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the generation_config's list and the tokenizer's own."""
    return stop_token_ids(base.folder, tokenizer)
