"""A release in the forms other programs load: merged weights, GGUF, vLLM, Ollama, the hub."""

import importlib.util
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from fintune import console, files, seal
from fintune.chat import ChatFormat
from fintune.errors import ConfigError, GateRefused, ModelError, OutputError
from fintune.example import Message
from fintune.model import DTYPES, Base, open_release
from fintune.release.card import VLLM_RANKS, vllm_rank
from fintune.release.fixture import CONVERSATIONS, read_fixture
from fintune.release.verify import load_release, verify
from fintune.untrusted import checks, open_folder
from fintune.untrusted.probe import read_tokenizer

MERGE_LIMIT = 1e-4
"""Largest difference of a logit between adapter and merged weights, both in fp32."""
NOTICES = ("LICENSE", "NOTICE", "USE_POLICY.md")
PRECISIONS: dict[str, tuple[str, ...]] = {
    "merged": ("bf16", "fp16", "fp32"),
    "gguf": ("f16", "f32"),
    "ollama": ("f16", "f32"),
    "vllm": (),
    "push": (),
}
"""Forms of an export, and the precisions that each can be written in."""


def merged(folder: Path, out: Path, *, base: Path | None = None, dtype: str = "bf16") -> Path:
    """Write base and adapter as one model that needs no peft.

    Merged in fp32, where the logits are held against the adapter's, and rounded once at the end.

    Args:
        dtype: precision of the written weights, bf16, fp16 or fp32.

    Raises:
        GateRefused: merged and adapter logits differ by more than `MERGE_LIMIT`.
        ConfigError: another `dtype`. OutputError: `out` exists.
    """
    check_precision("merged", dtype)
    with _claimed(out):
        found, tokenizer, model = _load_merged(folder, base)
        with files.staged_folder(out, published=True) as staging:
            model.to(DTYPES[dtype]).save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            for name in NOTICES:
                if (folder / name).is_file():
                    files.copy_file(folder / name, staging / name)
    console.say(f"merged {found.id} and {folder.name} into {out} ({dtype})")
    return out


def gguf(
    folder: Path, out: Path, *, base: Path | None = None, dtype: str = "f16", whole: bool = False
) -> Path:
    """Write the adapter, or with `whole` the merged model, as one GGUF file.

    Args:
        out: the file.
        dtype: f16 or f32.

    Raises:
        ModelError: the gguf package is not installed, or the base is not Llama-shaped.
        ConfigError: another `dtype`. OutputError: `out` exists.
    """
    check_precision("gguf", dtype)
    with _claimed(out):
        _write_gguf(folder, out, base, dtype, whole)
    console.say(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)")
    return out


def _write_gguf(folder: Path, out: Path, base: Path | None, dtype: str, whole: bool) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the gguf package is not installed", fix="pip install 'fintune[export]'")
    from fintune.release import gguf as writing

    temporary = out.with_name(f".{out.name}.part")
    temporary.unlink(missing_ok=True)  # of a killed export; never written through a link
    try:
        if whole:
            found, tokenizer, model = _load_merged(folder, base)
            writing.write_model(found, tokenizer, model.state_dict(), temporary, dtype, folder.name)
        else:
            writing.write_adapter(folder, open_release(folder, base), temporary, dtype)
        temporary.chmod(0o644)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def vllm(folder: Path) -> str:
    """The command that serves this release with vLLM, checked against what vLLM can load.

    `--generation-config vllm` keeps the base's sampling defaults out, and the template of the
    release replaces the base's.

    Raises:
        ModelError: an adapter that vLLM refuses.
    """
    open_folder(folder, "release")
    config = checks.read_object(folder, checks.ADAPTER_CONFIG)
    asked = [key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
    if config["r"] > VLLM_RANKS[-1]:
        asked.append(f"rank {config['r']} (at most {VLLM_RANKS[-1]})")
    if asked:
        raise ModelError(f"vLLM does not load an adapter with {', '.join(asked)}")
    fixture, path = read_fixture(folder), folder.resolve()
    words = ["vllm", "serve", config["base_model_name_or_path"]]
    if config.get("revision") and len(config["revision"]) == 40:  # a commit of the hub
        words += ["--revision", config["revision"]]
    words += ["--enable-lora", "--max-lora-rank", str(vllm_rank(config["r"]))]
    words += ["--lora-modules", f"{folder.name}={path}"]
    words += ["--chat-template", str(path / checks.TEMPLATE), "--generation-config", "vllm"]
    if fixture:
        date = files.canonical_json({"date_string": fixture["date_string"]})
        words += ["--default-chat-template-kwargs", date]
    return shlex.join(words)


def ollama(folder: Path, out: Path, *, base: Path | None = None, dtype: str = "f16") -> Path:
    """Write a folder that `ollama create NAME -f Modelfile` takes: merged GGUF and Modelfile."""
    check_precision("ollama", dtype)
    open_release(folder, base)
    tokenizer, fixture = read_tokenizer(folder), read_fixture(folder)
    if fixture is None:
        raise ModelError(f"{folder} has no {checks.FIXTURE}", why="it pins the template's date")
    template = ollama_template(ChatFormat(tokenizer, fixture["date_string"]))
    with _claimed(out), files.staged_folder(out, published=True) as staging:
        _write_gguf(folder, staging / "model.gguf", base, dtype, whole=True)
        modelfile = (
            f'FROM ./model.gguf\nTEMPLATE """{template}"""\n'
            f"PARAMETER stop {tokenizer.eos_token}\nPARAMETER temperature 0\n"
        )
        files.write_text(staging / "Modelfile", modelfile)
    console.say(f"next: ollama create {folder.name.lower()} -f {out / 'Modelfile'}")
    return out


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


def push(folder: Path, repository: str, *, base: Path | None = None, really: bool = False) -> str:
    """Verify a release and upload it to the hub; without `really`, only say what would happen.

    The token is read from HF_TOKEN (or the hub's own login) and never from an argument.

    Returns:
        The address of the upload, or the plan.
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


def _load_merged(folder: Path, base: Path | None) -> tuple[Base, Any, Any]:
    """Base, tokenizer and merged fp32 model, its logits held against the adapter's."""
    found = open_release(folder, base)
    tokenizer = read_tokenizer(folder)
    model = load_release(folder, found, "fp32")
    fixture = read_fixture(folder)
    chat = ChatFormat(tokenizer, fixture["date_string"] if fixture else "26 Jul 2024")
    prompts = [chat.encode(messages).input_ids for messages in CONVERSATIONS.values()]
    before = _logits(model, prompts)
    model = model.merge_and_unload()
    worst = max(
        float((old - new).abs().max())
        for old, new in zip(before, _logits(model, prompts), strict=True)
    )
    if not worst <= MERGE_LIMIT:
        raise GateRefused(
            f"merged and adapter logits differ by {worst:.1e} (limit {MERGE_LIMIT:.0e})",
            why="the merged model would answer differently",
        )
    console.say(f"largest logit difference of merged and adapter: {worst:.1e} (fp32)")
    return found, tokenizer, model


def _logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits.cpu() for ids in prompts]


def _between(text: str) -> list[str]:
    """The pieces of a rendered text before, between and after its marks."""
    pieces = text.replace("\ue001", "\ue000").split("\ue000")
    return pieces[::2]


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """A place that nothing has yet, locked."""
    with seal.lock(out):
        if out.exists():
            raise OutputError(f"{out} exists", fix="name another place, or move it away")
        yield


def check_precision(form: str, dtype: str | None) -> None:
    """Refuse a form or its precision that an export does not have; None is the form's own.

    Raises:
        ConfigError: see above.
    """
    if form not in PRECISIONS:
        raise ConfigError(f"no form {form!r}", fix=f"one of {', '.join(PRECISIONS)}")
    if dtype is not None and dtype not in PRECISIONS[form]:
        choices = ", ".join(PRECISIONS[form])
        raise ConfigError(
            f"export {form} has no --dtype {dtype}",
            fix=f"one of {choices}" if choices else "leave it away",
        )
