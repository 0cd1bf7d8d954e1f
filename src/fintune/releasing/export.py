"""A release in the formats of other programs; each is a function with `@exports.command()`."""

import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
import typer

from fintune import console, files, page, seal
from fintune.chat import ChatFormat
from fintune.errors import GateRefused, ModelError, OutputError, needing
from fintune.example import Message
from fintune.hub import COMMIT
from fintune.model import DTYPES, LoadedRelease, find_release, load_release, open_release
from fintune.releasing.bundle import VLLM_RANKS, vllm_rank
from fintune.releasing.push import push_release
from fintune.releasing.verify import CONVERSATIONS, verify
from fintune.untrusted import checks
from fintune.untrusted.static import open_folder

MERGE_LIMIT = 1e-4
"""Largest difference of a logit between adapter and merged weights, both in fp32, as a share of the
largest logit: rounding grows with the logits (a base of 135 M parameters: 1.3e-4 of 30)."""

GGUF_DTYPES = {"f16": torch.float16, "f32": torch.float32}

exports = typer.Typer()
_RELEASE = "A release folder, or hub id (also ID@REVISION)."
Folder = Annotated[Path, typer.Argument(help=_RELEASE, callback=find_release)]
Out = Annotated[Path, typer.Option(help="What to write; nothing may be there yet.")]
BaseFolder = Annotated[
    Path | None,
    typer.Option(help="Its base, a folder or GGUF file; else the one it was trained on."),
]
DType = Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Precision of the weights.")]
GgufType = Annotated[Literal["f16", "f32"], typer.Option(help="Of matrices; vectors are f32.")]


@exports.command()
def merged(folder: Folder, out: Out, base: BaseFolder = None, dtype: DType = "bf16") -> Path:
    """Write base and adapter as one model that needs no peft.

    Merged in fp32, where the logits are held against the adapter's, and rounded once at the end.
    """
    with _claimed(out), files.staged_folder(out, published=True) as staging:
        loaded = _load_merged(folder, base, DTYPES[dtype])
        loaded.model.to(DTYPES[dtype]).save_pretrained(staging)
        loaded.chat.tokenizer.save_pretrained(staging)
        for notice in ("LICENSE", "NOTICE"):
            if (folder / notice).is_file():
                files.copy_file(folder / notice, staging / notice)
    console.say(f"merged {loaded.base.id} and {folder.name} into {out} ({dtype})")
    return out


@exports.command()
def gguf(
    folder: Folder,
    out: Out,
    base: BaseFolder = None,
    dtype: GgufType = "f16",
    merged: Annotated[bool, typer.Option("--merged", help="Of the merged model.")] = False,
) -> Path:
    """Write the adapter, or the merged model, as one GGUF file for llama.cpp."""
    writer = _gguf_writer()
    with _claimed(out), tempfile.TemporaryDirectory(dir=out.parent) as staging:
        part = Path(staging, out.name)
        if merged:
            whole = _load_merged(folder, base, GGUF_DTYPES[dtype], least_dimensions=2)
            writer.write_model(whole, part, dtype, folder.name)
        else:
            writer.write_adapter(folder, open_release(folder, base), part, dtype)
        part.chmod(0o644)
        os.replace(part, out)
    console.say(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)")
    return out


@exports.command()
def vllm(folder: Folder) -> str:
    """Print the command that serves this release with vLLM, checked against what vLLM can load.

    `--generation-config vllm` keeps the base's sampling defaults out, and the template of the
    release replaces the base's.
    """
    open_folder(folder, "release")
    config = checks.read_object(folder, checks.ADAPTER_CONFIG)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    refused = [key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
    if rank > VLLM_RANKS[-1]:
        refused.append(f"rank {rank} (at most {VLLM_RANKS[-1]})")
    if config.get("bias", "none") != "none":
        refused.append(f"bias {config['bias']!r}")
    if refused:
        raise ModelError(f"vLLM does not load an adapter with {', '.join(refused)}")
    path, revision = folder.resolve(), config.get("revision") or ""
    words = ["vllm", "serve", config["base_model_name_or_path"]]
    words += ["--revision", revision] if COMMIT.fullmatch(revision) else []
    words += ["--enable-lora", "--max-lora-rank", str(vllm_rank(rank))]
    words += ["--lora-modules", f"{folder.name}={path}"]
    words += ["--chat-template", str(path / checks.TEMPLATE), "--generation-config", "vllm"]
    if golden := checks.read_object(folder, checks.FIXTURE, absent=True):
        variables = files.canonical_json(golden["chat"]["variables"])
        words += ["--default-chat-template-kwargs", variables]
    return shlex.join(words)


@exports.command()
def ollama(folder: Folder, out: Out, base: BaseFolder = None, dtype: GgufType = "f16") -> Path:
    """Write a folder that `ollama create NAME -f Modelfile` takes: merged GGUF and Modelfile."""
    writer = _gguf_writer()
    with _claimed(out), files.staged_folder(out, published=True) as staging:
        loaded = _load_merged(folder, base, GGUF_DTYPES[dtype], least_dimensions=2)
        files.write_text(staging / "Modelfile", ollama_modelfile(loaded.chat) + "\n")
        writer.write_model(loaded, staging / "model.gguf", dtype, folder.name)
    console.say(f"next: ollama create {folder.name.lower()} -f {out / 'Modelfile'}")
    return out


@exports.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Option(help="Where to on the hub: you/name.")],
    base: BaseFolder = None,
    really: Annotated[bool, typer.Option("--really", help="Upload, not only say what.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Everyone may read it.")] = False,
) -> str:
    """Verify a release and make it the content of a hub repository, in one commit; private.

    The token is read from HF_TOKEN (or the login of huggingface_hub) and never from an argument.
    """
    if "/" not in repository:
        raise OutputError(f"--repository {repository} names no owner", fix="--repository you/name")
    verify(folder, base=base).settle()
    if not really:
        names = ", ".join(path.name for path in checks.entries(folder))
        return f"would upload to {repository} ({'public' if public else 'private'}): {names}"
    return push_release(folder, repository, public=public)


def ollama_modelfile(chat: ChatFormat) -> str:
    """A Modelfile whose template, in Go's language, writes what the chat template does.

    Conversations of marked texts are rendered, and the text between the marks is what opens and
    closes each turn. BOS is left out where llama.cpp adds it.

    Raises:
        ModelError: a template whose turns are not alike.
    """
    user, answer, system = (Message(r, f"\ue000{r}\ue001") for r in ("user", "assistant", "system"))
    whole = chat.template.render([system, user, answer, user], prompt=True)
    head, after_system, after_user, after_answer, last = _between(whole)
    plain, opened = _between(chat.template.render([user], prompt=True))
    close = chat.template.end
    bos = chat.tokenizer.bos_token if _gguf_writer().adds_bos(chat.tokenizer) else ""
    open_user, open_answer = after_system.removeprefix(close), after_user.removeprefix(close)
    alike = after_system == close + open_user == after_answer and after_user == last == opened
    if not alike or not plain.endswith(open_user) or last != close + open_answer:
        raise ModelError("this chat template cannot be written in Ollama's template language")
    return page.render(
        "Modelfile.jinja",
        with_system=head.removeprefix(bos),
        without_system=plain.removesuffix(open_user).removeprefix(bos),
        user=open_user,
        assistant=open_answer,
        close=close,
        stops=chat.tokenizer.convert_ids_to_tokens(chat.stop_token_ids),
    )


def _gguf_writer() -> ModuleType:
    with needing("export", "writing a GGUF file"):
        from fintune.releasing import gguf as writer
    return writer


def _load_merged(
    folder: Path, base: Path | None, dtype: torch.dtype, *, least_dimensions: int = 0
) -> LoadedRelease:
    """The release merged in fp32, its logits held against the adapter's, then rounded.

    Args:
        least_dimensions: of a weight that is rounded; 2 leaves vectors as they are.

    Raises:
        GateRefused: merging changes the logits by more than rounding.
    """
    loaded = load_release(folder, open_release(folder, base), dtype="fp32")
    before = _logits(loaded.model, loaded.chat)
    merged = loaded.model.merge_and_unload()
    worst = float((_logits(merged, loaded.chat) - before).abs().max() / before.abs().max())
    if not worst <= MERGE_LIMIT:
        what = f"merged and adapter logits differ by {worst:.1e} of the largest one"
        why = "the merged model would answer differently"
        raise GateRefused(f"{what} (limit {MERGE_LIMIT:.0e})", why=why)
    console.say(f"logits of merged and adapter differ by {worst:.1e} of the largest one (fp32)")
    if dtype is not torch.float32:
        with torch.no_grad():
            for weight in merged.parameters():
                if weight.ndim >= least_dimensions:
                    weight.copy_(weight.to(dtype))
        same = _logits(merged, loaded.chat).argmax(-1) == before.argmax(-1)
        name = str(dtype).removeprefix("torch.")
        console.say(f"rounded to {name}: {int(same.sum())} of {len(same)} likeliest tokens equal")
    return replace(loaded, model=merged)


def _logits(model: Any, chat: ChatFormat) -> torch.Tensor:
    """Logits of every token of the golden prompts, [tokens, vocabulary]."""
    rows = [chat.encode(messages).input_ids for messages in CONVERSATIONS.values()]
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([r], device=model.device)).logits[0] for r in rows])


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
