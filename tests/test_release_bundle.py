"""Releases beyond the frozen tests: snippets of the card, mismatched folders, licences."""

import contextlib
import io
import json
import pickletools
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny
from huggingface_hub import ModelCard


def blocks(path: Path) -> list[str]:
    """The Python of a card."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)


def test_the_snippets_of_the_card_run(chain: tiny.Chain) -> None:
    card = ModelCard.load(chain.release / "README.md")
    assert card.data.base_model == tiny.BASE_ID and card.data.library_name == "peft"
    assert card.data.license is None, "not known, so not stated"
    seed, chat = blocks(chain.release / "README.md")
    seed = seed.replace(f'base = "{tiny.BASE_ID}"', f'base = "{tiny.base()}"')
    seed = re.sub('adapter = ".*"', f'adapter = "{chain.release}"', seed)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(seed.replace("max_new_tokens=256", "max_new_tokens=4") + chat, {})
    fixture = json.loads((chain.release / "prompt_fixture.json").read_text())
    assert f'date_string="{fixture["chat"]["variables"]["date_string"]}"' in chat
    assert "Explain what a yield curve inversion implies for equities." in printed.getvalue()


def test_the_published_snippet_is_the_card_s_letter_for_letter(chain: tiny.Chain) -> None:
    published = tiny.SHARED / "seed-model-card.md"
    if not published.is_file():
        pytest.skip("no ../shared/seed-model-card.md")
    ours, theirs = (blocks(path)[0] for path in (chain.release / "README.md", published))
    names = re.compile(r'^((?:base|adapter) = )".*"$', flags=re.M)
    assert names.sub(r"\1", ours) == names.sub(r"\1", theirs)


def test_text_of_others_reaches_the_card_without_control_characters(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    given = tiny.words(release_out=tmp_path / "r", training_args_bin=True)
    tiny.done("release", *chain.words(), *given, "--accept", "a \x1b[31mred\u202e reason")
    assert "a \\x1b[31mred\\u202e reason" in (tmp_path / "r" / "README.md").read_text()
    # The pickle's opcodes are listed, never run: settings of the run, no secret, no machine.
    with zipfile.ZipFile(tmp_path / "r" / "training_args.bin") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        opcodes = list(pickletools.genops(archive.read(name)))
    words = [value for _, value, _ in opcodes if isinstance(value, str)]
    modules = {word.split(".")[0].split(" ")[0] for op, word, _ in opcodes if op.name == "GLOBAL"}
    assert modules <= {"transformers", "torch", "accelerate", "builtins", "collections"}
    assert "learning_rate" in words
    assert not [word for word in words if word.startswith(("/", "hf_")) or "runs/" in word]


def test_the_same_release_again_is_kept_and_another_refused(chain: tiny.Chain) -> None:
    before = (chain.release / "SHA256SUMS").stat().st_mtime_ns
    assert "unchanged" in tiny.done("release", *chain.words()).err
    assert (chain.release / "SHA256SUMS").stat().st_mtime_ns == before
    other = tiny.fintune("release", *chain.words(), "-s", "release.license=mit")
    assert (other.code, "release.license" in other.err) == (1, True)


@pytest.mark.parametrize(
    ("stage", "inputs", "named"),
    [
        ("eval", {"adapter": "0" * 64}, "the evaluation is of another adapter"),
        ("eval", {"test": "0" * 64}, "the evaluation decided by other rows"),
        ("eval", {"train": "0" * 64}, "the evaluation compared with other training rows"),
        ("run", {"base": {"revision": "0" * 64}}, "the run was trained on another base"),
        ("run", {"data": {"train.parquet": "0" * 64}}, "the run was trained on other data"),
    ],
)
def test_what_does_not_belong_together_is_refused_whatever_is_accepted(
    chain: tiny.Chain, tmp_path: Path, stage: str, inputs: dict[str, object], named: str
) -> None:
    copy = chain.copy(tmp_path, "data", "run", "eval")
    tiny.reseal(copy.out / stage, **inputs)
    said = tiny.fintune("release", *copy.words(), "--accept", "a verdict alone can be accepted")
    assert (said.code, named in said.err) == (3, True), said.err
    assert not copy.release.exists()


def test_a_local_path_in_a_published_file_is_refused(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data", "run", "eval")
    path = copy.eval / "eval_50_gpt_judged_raw.jsonl"
    path.write_text(path.read_text().replace('"no_judge"', '"/home/x/y"'))
    tiny.reseal(copy.eval)
    said = tiny.fintune("release", *copy.words())
    assert (said.code, f"{path.name} (/home/x)" in said.err) == (3, True), said.err


def test_a_llama_base_brings_its_licence(chain: tiny.Chain, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.base(), tmp_path / "base"))
    llama = tiny.words(base="meta-llama/Meta-Llama-3.1-8B-Instruct", base_path=base)
    given = ("release", *chain.words(), *llama, *tiny.words(release_out=tmp_path / "r"))
    refused = tiny.fintune(*given)
    assert (refused.code, "no licence text" in refused.err) == (3, True), refused.err
    (base / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n")
    tiny.done(*given)
    card = (tmp_path / "r" / "README.md").read_text()
    assert "# Llama run" in card and "**Built with Llama.**" in card
    assert "license: llama3.1" in card
    assert (tmp_path / "r" / "LICENSE").read_text() == (base / "LICENSE").read_text()
    assert "Llama 3.1 is licensed under" in (tmp_path / "r" / "NOTICE").read_text()
