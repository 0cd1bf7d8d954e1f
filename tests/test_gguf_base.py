"""A GGUF file as a base: read rightly, once, under its own name, or refused with one message."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fintune import gguf_base
from fintune.chat import ChatFormat
from fintune.config import ChatConfig, ModelConfig
from fintune.errors import ModelError
from fintune.model import Base, LoadedRelease, find_base, load_tokenizer
from fintune.releasing.gguf import write_model

TEXTS = [
    "Revenue was $1,284 million.\n\n2023:  12%",
    "It's <|eot_id|> up 5't ½ é 日本",
    " a  b\n c ",
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(folder: Path, **shape: object) -> Path:
    """The tiny base, of another shape perhaps, as a GGUF file in fp32."""
    config = LlamaConfig.from_pretrained(tiny.base())
    config.update(shape)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    base = Base("test/tiny", "", folder / "safetensors")
    base.folder.mkdir(parents=True)
    model.save_pretrained(base.folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base.folder / name).write_bytes((tiny.base() / name).read_bytes())
    chat = ChatFormat(load_tokenizer(base), ChatConfig())
    write_model(LoadedRelease(base, model, "fp32", chat), folder / "t.gguf", "f32", "t")
    return folder / "t.gguf"


@pytest.mark.parametrize("scaled", [False, True])
def test_weights_tokens_template_and_stops_come_back(tmp_path: Path, scaled: bool) -> None:
    rope = {"factor": 8.0, **gguf_base.CUTS["rope"], "rope_theta": 5e5}
    file = written(tmp_path, **({"rope_parameters": rope} if scaled else {}))
    kept = gguf_base.read(file)
    assert kept is not None and kept.about == "read from F32"
    before, after = (
        load_file(f / "model.safetensors") for f in (tmp_path / "safetensors", kept.folder)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    read, given = (AutoTokenizer.from_pretrained(f) for f in (kept.folder, tiny.base()))
    for text in TEXTS:
        assert read.encode(text, add_special_tokens=False) == given.encode(
            text, add_special_tokens=False
        )
    assert read.chat_template == given.chat_template
    ends = json.loads((kept.folder / "generation_config.json").read_text())["eos_token_id"]
    assert given.eos_token_id in ends
    config = LlamaConfig.from_pretrained(kept.folder)
    assert config.rope_parameters["rope_type"] == ("llama3" if scaled else "default")
    assert {**config.rope_parameters} == rope or not scaled


def test_digits_are_cut_one_by_one_where_llama_cpp_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.base())
    gguf_base._recut(tokenizer.backend_tokenizer, "smollm")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in\n\n2023:  12%")
    assert [piece for piece, _ in pieces] == [
        "in",
        "ĊĊ",
        "2",
        "0",
        "2",
        "3",
        ":",
        "ĠĠ",
        "1",
        "2",
        "%",
    ]


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """A change of a file's first such bytes, which must be there."""

    def change(data: bytes) -> bytes:
        assert len(old) == len(new) and old in data
        return data.replace(old, new, 1)

    return change


LENGTH = b"\x05\0\0\0\0\0\0\0"
BAD = {
    "no GGUF": (lambda data: b"PK" + data[2:], "is not a GGUF file"),
    "cut in the weights": (lambda data: data[:-100], "is cut"),
    "cut in the header": (lambda data: data[:9000], "cannot be read as GGUF"),
    "no tokenizer": (replaced(b"tokenizer.ggml.model", b"tokenizer.ggml.nodel"), "no tokenizer"),
    "another cut of the text": (replaced(b"llama-bpe", b"llama-xyz"), "cuts texts as 'llama-xyz'"),
    "an unknown architecture": (replaced(LENGTH + b"llama", LENGTH + b"lxxma"), "lxxma"),
    "many layers": (
        replaced(b"llama.block_count\x04\0\0\0\x02\0", b"llama.block_count\x04\0\0\0\x02\x99"),
        "too few tensors",
    ),
    "a wide layer": (
        replaced(b"forward_length\x04\0\0\0\xc0\0\0", b"forward_length\x04\0\0\0\xc0\0\x99"),
        "larger model than it holds",
    ),
    "a lost tensor": (replaced(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"), "reads it without"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_with_one_message(tmp_path: Path, name: str) -> None:
    change, words = BAD[name]
    file = written(tmp_path)
    file.write_bytes(change(file.read_bytes()))
    said = tiny.fintune(
        "prepare", "-c", tiny.config(), *tiny.words(out=tmp_path / "o", base_path=file)
    )
    assert (said.code, "Traceback" in said.err, said.err.count("error:")) == (1, False, 1), said.err
    assert words in said.err
    kept = [p for p in (tmp_path / "cache" / "fintune" / "gguf").glob("*") if p.name[0] != "."]
    assert kept == [] and not (tmp_path / "o" / "data").exists()


def _read_there(file: Path, results: "multiprocessing.Queue[str]") -> None:
    kept = gguf_base.read(file)
    results.put(str(kept and kept.folder))


def test_a_folder_names_its_only_file_and_two_processes_read_it_once(tmp_path: Path) -> None:
    file = written(tmp_path / "models")
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    both = [context.Process(target=_read_there, args=(file.parent, results)) for _ in range(2)]
    for process in both:
        process.start()
    assert len({results.get(timeout=60) for _ in both}) == 1
    base = find_base(ModelConfig(path=file.parent))
    assert base.id == "local/models" and base.revision == tiny.file_sha256(file)
    assert base.about == f"models, read from F32, sha256 {base.revision} of the GGUF file"
    (tmp_path / "models" / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="2 GGUF files"):
        find_base(ModelConfig(path=file.parent))


def test_a_release_on_it_says_so_and_finds_it_again(tmp_path: Path) -> None:
    file = written(tmp_path)
    words = tiny.chain(
        tmp_path / "o", base_path=file, base="you/tiny", max_steps=4, tasks=tiny.tasks()
    )
    for verb in ("prepare", "train", "eval"):
        tiny.done(verb, *words)
    tiny.done("release", *words, "--accept", "a test")
    release = tmp_path / "o" / "release"
    about = f"tiny, read from F32, sha256 {tiny.file_sha256(file)} of the GGUF file"
    config = json.loads((release / "training_config.json").read_text())
    assert config["provenance"]["base"] == about
    for page in (release / "README.md", tmp_path / "o" / "eval" / "report.html"):
        assert about in page.read_text()
    tiny.done("verify", release)
    tiny.done("verify", release, "--base", file)
    for path in (tmp_path / "cache" / "fintune" / "gguf").glob("*/gguf.json"):
        path.unlink()
    said = tiny.fintune("verify", release)
    assert said.code == 1 and "--base PATH" in said.err and about in said.err
