"""A release in the forms other programs load; a form is a function with `@exports.command()`."""

import importlib.util
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import huggingface_hub
import torch
import typer

from fintune import console, files, seal
from fintune.chat import ChatFormat
from fintune.errors import GateRefused, ModelError, OutputError
from fintune.example import Message
from fintune.model import DTYPES, LoadedRelease, load_release, open_release
from fintune.release.card import VLLM_RANKS, vllm_rank
from fintune.release.golden import CONVERSATIONS, read_golden_prompts
from fintune.release.verify import verify
from fintune.untrusted import checks, open_folder
from fintune.untrusted.probe import read_tokenizer

MERGE_LIMIT = 1e-4
"""Largest difference of a logit between adapter and merged weights, both in fp32."""
NOTICES = ("LICENSE", "NOTICE", "USE_POLICY.md")

exports = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="A release folder.")]
Out = Annotated[Path, typer.Option(help="What to write; nothing may be there yet.")]
BaseFolder = Annotated[
    Path | None, typer.Option(help="Folder of the base; absent: the bundled one or the hub's.")
]
GgufType = Annotated[
    Literal["f16", "f32"], typer.Option(help="Precision of matrices; vectors are f32.")
]


@exports.command()
def merged(
    folder: Folder,
    out: Out,
    base: BaseFolder = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Precision of the weights.")
    ] = "bf16",
) -> Path:
    """Write base and adapter as one model that needs no peft.

    Merged in fp32, where the logits are held against the adapter's, and rounded once at the end.
    """
    with _claimed(out):
        loaded = _load_merged(folder, base)
        with files.staged_folder(out, published=True) as staging:
            loaded.model.to(DTYPES[dtype]).save_pretrained(staging)
            loaded.chat.tokenizer.save_pretrained(staging)
            for name in NOTICES:
                if (folder / name).is_file():
                    files.copy_file(folder / name, staging / name)
    console.say(f"merged {loaded.base.id} and {folder.name} into {out} ({dtype})")
    return out


@exports.command()
def gguf(
    folder: Folder,
    out: Out,
    base: BaseFolder = None,
    dtype: GgufType = "f16",
    merged: Annotated[
        bool, typer.Option("--merged", help="The merged model, not the adapter alone.")
    ] = False,
) -> Path:
    """Write the adapter, or the merged model, as one GGUF file for llama.cpp."""
    with _claimed(out):
        _write_gguf(folder, out, base, dtype, merged)
    console.say(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)")
    return out


def _write_gguf(folder: Path, out: Path, base: Path | None, dtype: str, merged: bool) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the gguf package is not installed", fix="pip install 'fintune[export]'")
    from fintune.release import gguf as writer

    part = out.with_name(f".{out.name}.part")
    part.unlink(missing_ok=True)  # of a killed export; never written through a link
    try:
        if merged:
            loaded = _load_merged(folder, base)
            weights, tokenizer = loaded.model.state_dict(), loaded.chat.tokenizer
            writer.write_model(loaded.base, tokenizer, weights, part, dtype, folder.name)
        else:
            writer.write_adapter(folder, open_release(folder, base), part, dtype)
        part.chmod(0o644)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


@exports.command()
def vllm(folder: Folder) -> str:
    """Print the command that serves this release with vLLM, checked against what vLLM can load.

    `--generation-config vllm` keeps the base's sampling defaults out, and the template of the
    release replaces the base's.
    """
    open_folder(folder, "release")
    config = checks.read_object(folder, checks.ADAPTER_CONFIG)
    refused = [key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > VLLM_RANKS[-1]:
        refused.append(f"rank {rank} (at most {VLLM_RANKS[-1]})")
    if config.get("bias", "none") != "none":
        refused.append(f"bias {config['bias']!r}")
    if refused:
        raise ModelError(f"vLLM does not load an adapter with {', '.join(refused)}")
    golden, path = read_golden_prompts(folder), folder.resolve()
    words = ["vllm", "serve", config["base_model_name_or_path"]]
    if config.get("revision") and len(config["revision"]) == 40:  # a commit of the hub
        words += ["--revision", config["revision"]]
    words += ["--enable-lora", "--max-lora-rank", str(vllm_rank(rank))]
    words += ["--lora-modules", f"{folder.name}={path}"]
    words += ["--chat-template", str(path / checks.TEMPLATE), "--generation-config", "vllm"]
    if golden:
        date = files.canonical_json({"date_string": golden["date_string"]})
        words += ["--default-chat-template-kwargs", date]
    return shlex.join(words)


@exports.command()
def ollama(folder: Folder, out: Out, base: BaseFolder = None, dtype: GgufType = "f16") -> Path:
    """Write a folder that `ollama create NAME -f Modelfile` takes: merged GGUF and Modelfile."""
    open_release(folder, base)
    golden = read_golden_prompts(folder)
    if golden is None:
        raise ModelError(f"{folder} has no {checks.FIXTURE}", why="it pins the template's date")
    tokenizer = read_tokenizer(folder)
    template = ollama_template(ChatFormat(tokenizer, golden["date_string"]))
    with _claimed(out), files.staged_folder(out, published=True) as staging:
        _write_gguf(folder, staging / "model.gguf", base, dtype, merged=True)
        modelfile = (
            f'FROM ./model.gguf\nTEMPLATE """{template}"""\n'
            f"PARAMETER stop {tokenizer.eos_token}\nPARAMETER temperature 0\n"
        )
        files.write_text(staging / "Modelfile", modelfile)
    console.say(f"next: ollama create {folder.name.lower()} -f {out / 'Modelfile'}")
    return out


@exports.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Option(help="Where to on the hub: you/name.")],
    base: BaseFolder = None,
    really: Annotated[
        bool, typer.Option("--really", help="Upload, instead of saying what would be.")
    ] = False,
) -> str:
    """Verify a release and upload it to the hub, private.

    The token is read from HF_TOKEN (or the hub's own login) and never from an argument.
    """
    verify(folder, base=base).settle()
    names = sorted(path.name for path in folder.iterdir())
    if not really:
        return f"would upload to {repository} (private): {', '.join(names)}"
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names))
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise OutputError(
            f"the hub did not take {repository} ({type(error).__name__})",
            fix="set HF_TOKEN to a token that may write there, and check the network",
        ) from None


def ollama_template(chat: ChatFormat) -> str:
    """The chat template in Ollama's language (Go's), read off the template's own output.

    Marked texts are rendered and the words between the marks become the template: what opens a
    system, user or assistant turn, what closes one, and what stands there without a system text.
    BOS is left out, since llama.cpp adds it.

    Raises:
        ModelError: a template whose turns are not alike.
    """
    user, answer, system = (Message(r, f"\ue000{r}\ue001") for r in ("user", "assistant", "system"))
    whole = chat.render([system, user, answer, user], prompt=True)
    head, after_system, after_user, after_answer, last = _between(whole)
    plain, opened = _between(chat.render([user], prompt=True))
    close = chat.tokenizer.eos_token
    if not after_system.startswith(close) or (after_system, after_user) != (after_answer, last):
        raise ModelError("this chat template cannot be written in Ollama's template language")
    open_user, open_answer = after_system[len(close) :], after_user[len(close) :]
    if not plain.endswith(open_user) or opened != close + open_answer:
        raise ModelError("this chat template writes other turns when there is no system text")
    bos = chat.tokenizer.bos_token or ""
    template: str = (
        "{{ if .System }}" + head.removeprefix(bos) + "{{ .System }}" + close
        + "{{ else }}" + plain.removesuffix(open_user).removeprefix(bos) + "{{ end }}"
        + '{{ range .Messages }}{{ if eq .Role "user" }}' + open_user + "{{ .Content }}" + close
        + '{{ else if eq .Role "assistant" }}' + open_answer + "{{ .Content }}" + close
        + "{{ end }}{{ end }}" + open_answer
    )  # fmt: skip
    return template


def _load_merged(folder: Path, base: Path | None) -> LoadedRelease:
    """The release merged in fp32, its logits held against the adapter's."""
    loaded = load_release(folder, open_release(folder, base), dtype="fp32")
    prompts = [loaded.chat.encode(messages).input_ids for messages in CONVERSATIONS.values()]
    before = _logits(loaded.model, prompts)
    merged = loaded.model.merge_and_unload()
    after = _logits(merged, prompts)
    worst = max(float((old - new).abs().max()) for old, new in zip(before, after, strict=True))
    if not worst <= MERGE_LIMIT:
        raise GateRefused(
            f"merged and adapter logits differ by {worst:.1e} (limit {MERGE_LIMIT:.0e})",
            why="the merged model would answer differently",
        )
    console.say(f"largest logit difference of merged and adapter: {worst:.1e} (fp32)")
    return replace(loaded, model=merged)


def _logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([ids], device=model.device)).logits.cpu()
            for ids in prompts
        ]


def _between(text: str) -> list[str]:
    """The pieces of a rendered text before, between and after its marks."""
    return text.replace("\ue001", "\ue000").split("\ue000")[::2]


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """A place that nothing has yet, locked."""
    with seal.lock(out):
        if out.exists():
            raise OutputError(f"{out} exists", fix="name another place, or move it away")
        yield
