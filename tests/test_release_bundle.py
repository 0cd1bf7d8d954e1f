"""Releases beyond the frozen tests: snippets of the card, mismatched folders, licences."""

import contextlib
import html
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
from tiny_release import built

from fintune import load_config


def blocks(path: Path) -> list[str]:
    """The Python of a card."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)


def test_the_snippets_of_the_card_run(chain: tiny.Chain) -> None:
    card = ModelCard.load(chain.release / "README.md")
    assert card.data.base_model == tiny.BASE_ID and card.data.library_name == "peft"
    assert card.data.license is None, "not known, so not stated"
    chat, seed = blocks(chain.release / "README.md")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(chain.release):
        for code in (chat, seed):
            code = code.replace(f'base = "{tiny.BASE_ID}"', f'base = "{tiny.base()}"')
            exec(code.replace("max_new_tokens=256", "max_new_tokens=4"), {})
    fixture = json.loads((chain.release / "prompt_fixture.json").read_text())
    assert f'date_string="{fixture["chat"]["variables"]["date_string"]}"' in chat
    assert "Explain what a yield curve inversion implies for equities." in printed.getvalue()


def test_the_published_snippet_is_the_card_s_letter_for_letter(chain: tiny.Chain) -> None:
    published = tiny.SHARED / "seed-model-card.md"
    if not published.is_file():
        pytest.skip("no ../shared/seed-model-card.md")
    ours, theirs = (blocks(path)[-1] for path in (chain.release / "README.md", published))
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
    path.write_text(re.sub('"question": "', '"question": "/home/x/y ', path.read_text()))
    tiny.reseal(copy.eval)
    said = tiny.fintune("release", *copy.words(), "--accept", tiny.REASON)
    assert (said.code, f"{path.name} (/home/x)" in said.err) == (3, True), said.err


def test_a_llama_base_brings_its_licence(chain: tiny.Chain, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.base(), tmp_path / "base"))
    llama = tiny.words(base="meta-llama/Meta-Llama-3.1-8B-Instruct", base_path=base)
    given = ("release", *chain.words(), *llama, *tiny.words(release_out=tmp_path / "r"))
    refused = tiny.fintune(*given, "--accept", tiny.REASON)
    assert (refused.code, "no licence text" in refused.err) == (3, True), refused.err
    (base / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n")
    tiny.done(*given)
    card = (tmp_path / "r" / "README.md").read_text()
    assert "# Llama run" in card and "**Built with Llama.**" in card
    assert "license: llama3.1" in card
    assert (tmp_path / "r" / "LICENSE").read_text() == (base / "LICENSE").read_text()
    assert "Llama 3.1 is licensed under" in (tmp_path / "r" / "NOTICE").read_text()


# ---- what it says, and what of the rows is in it ------------------------------------------------


def texts(chain: tiny.Chain) -> list[str]:
    """Questions, references and answers of the evaluation, long enough to be told from others."""
    found = []
    for row in tiny.read_lines(chain.eval / "predictions.jsonl"):
        item = row["item"]
        found += [turn["content"] for turn in item["messages"] if turn["role"] == "user"]
        found += [item["reference"], row["text"]]
    return sorted({text for text in found if len(text) > 40})


def holding(folder: Path, wanted: list[str]) -> set[str]:
    """Files that hold one of these texts, as it is or as JSON or HTML spells it."""
    spelled = {form(text) for text in wanted for form in (str, html.escape, json_string)}
    read = {path.name: path.read_text(errors="replace") for path in folder.iterdir()}
    return {name for name, text in read.items() if any(one in text for one in spelled)}


def json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


@pytest.mark.parametrize("samples", ["ids", "none"])
def test_no_row_leaves_unless_asked(chain: tiny.Chain, tmp_path: Path, samples: str) -> None:
    wanted = texts(chain)
    held = holding(chain.release, wanted)
    assert {"eval_50_gpt_judged_raw.jsonl", "report.html"} <= held
    given = tiny.words(release_out=tmp_path / "r", samples=samples)
    said = tiny.done("release", *chain.words(), *given)
    assert holding(tmp_path / "r", wanted) == set()
    assert "contains 0 rows of your data" in said.err
    assert "contains 0 rows of its data" in (tmp_path / "r" / "README.md").read_text()
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert ("eval_50_gpt_judged_raw.jsonl" in names) == (samples == "ids")
    fixture = json.loads((tmp_path / "r" / "prompt_fixture.json").read_text())
    assert not [row for row in fixture["conversations"] if row["name"].startswith("held out")]
    assert tiny.fintune("verify", tmp_path / "r", "--base", tiny.base()).code == 0


def test_ids_are_the_default_and_text_is_counted(chain: tiny.Chain) -> None:
    assert load_config(tiny.config()).release.samples == "ids"
    rows = tiny.read_lines(chain.eval / "predictions.jsonl")
    own = {row["item"]["id"] for row in rows if row["item"]["task"] != "fpb"}
    card = (chain.release / "README.md").read_text()
    assert f"contains {len(own)} rows of its data" in card and own
    judged = tiny.read_lines(chain.release / "eval_50_gpt_judged_raw.jsonl")
    assert {row["status"] for row in judged} == {"not_judged"}


def test_an_acceptance_is_recorded_once(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data", "run", "eval")
    (copy.eval / ".accepted.json").unlink()
    words = ("release", *copy.words(), "--accept", "a rehearsal")
    for user, folder in (("anna", "one"), ("ben", "two")):
        said = tiny.fintune(*words, *tiny.words(release_out=tmp_path / folder), env={"USER": user})
        assert said.code == 0, said.err
    assert tiny.tree_sha256(tmp_path / "one") == tiny.tree_sha256(tmp_path / "two")
    facts = json.loads((tmp_path / "two" / "training_config.json").read_text())["provenance"]
    assert (facts["accepted_by"], facts["accepted"]) == ("anna", "a rehearsal")
    assert f"Accepted {facts['accepted_on']} by anna" in (tmp_path / "two/README.md").read_text()


def test_verify_is_a_gate(chain: tiny.Chain) -> None:
    words = ("verify", chain.release, "--base", tiny.base(), "--require", "better")
    refused = tiny.fintune(*words, "--json")
    checks = {check["name"]: check for check in json.loads(refused.out)}
    assert refused.code == 3 and "is no_detectable_difference, not better" in refused.err
    failed = [name for name, check in checks.items() if check["status"] == "failed"]
    assert failed == ["verdict"]
    assert tiny.REASON in checks["accepted"]["detail"]
    assert re.match(r"(0 days|1 day) since", checks["age"]["detail"])


def test_a_better_release_passes_the_gate() -> None:
    folder, base = built()
    assert tiny.fintune("verify", folder, "--base", base, "--require", "better").code == 0


def test_its_settings_are_a_config_again(chain: tiny.Chain) -> None:
    read = load_config(chain.release / "fintune.yaml")
    asked = load_config(chain.run / "config.yaml")
    own = {"data": {"source"}, "model": {"path"}}
    for section in ("train", "eval", "chat", "data", "model", "seed"):
        left_out = own.get(section, set()) | {"out"}
        ours, theirs = (config.model_dump(include={section})[section] for config in (read, asked))
        if isinstance(ours, dict):
            ours, theirs = (
                {k: v for k, v in d.items() if k not in left_out} for d in (ours, theirs)
            )
        if section == "eval":
            ours.pop("tasks"), theirs.pop("tasks")
        assert ours == theirs, section
    assert read.data.source == Path(asked.data.source).name


def test_the_card_says_what_nobody_checked(chain: tiny.Chain) -> None:
    card, risk = ((chain.release / name).read_text() for name in ("README.md", "model_risk.md"))
    results = json.loads((chain.eval / "test_results.json").read_text())
    order = sorted(results["tasks"], key=lambda name: results["tasks"][name]["difference"]["value"])
    rows = [line.split(" | ")[0][2:] for line in card.splitlines() if line.count(" of ") > 1]
    assert [name for name in rows if name in order] == order and len(order) > 1
    for text in (card, risk):
        assert "**Names and addresses are not looked for.**" in text
        assert "| general ability, kept or lost | not checked" in text
        assert "| benchmark questions among the training rows | not checked" in text
        assert "- Intended use: not stated" in text
        assert "| energy of training | not measured" in text
        assert "| answers that are wrong, rather than missing | base " in text
        assert "| not stated (`licence` of `data.sources`) |" in text
        assert "by not stated" not in text
    assert "Owner of the model | ____" in risk
    assert risk.count("# SR 11-7") == risk.count("# EU AI Act, Annex XI") == 1
    accounts = "dropped: personal_data, holds personal data, and the config says drop"
    manifest = json.loads((chain.data / "manifest.json").read_text())
    assert ("personal_data" in manifest["rows"]["dropped"]) == (accounts in card)


def test_use_and_language_are_those_of_the_config(chain: tiny.Chain, tmp_path: Path) -> None:
    given = ["-s", "release.intended_use=to sort tickets", "-s", "release.not_for=credit decisions"]
    tiny.done("release", *chain.words(), *tiny.words(release_out=tmp_path / "r"), *given)
    card = (tmp_path / "r" / "README.md").read_text()
    assert "- Intended use: to sort tickets." in card and "- Not for: credit decisions." in card
    assert "- Language: English; " in card


def test_a_judge_without_a_key_is_said_at_the_end(
    chain: tiny.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    copy = chain.copy(tmp_path, "data", "run", "eval")
    judge = ("-s", "eval.judge.model=judge-1", "--accept", tiny.REASON)
    said = tiny.fintune("run", *copy.words(), *judge)
    assert said.code == 0, said.err
    last = said.err.splitlines()[-1]
    assert "nothing was judged" in said.err and "OPENAI_API_KEY" in said.err, last


def test_a_base_of_no_hub_is_asked_for_by_its_folder(chain: tiny.Chain, tmp_path: Path) -> None:
    release = chain.copy(tmp_path, "release").release
    path = release / "adapter_config.json"
    tree = json.loads(path.read_text()) | {"base_model_name_or_path": "local/my-base"}
    path.write_text(json.dumps(tree))
    tiny.rewrite_stated(release)
    said = tiny.fintune("verify", release)
    assert said.code and "which is not here" in said.err and "--base PATH" in said.err
    assert "hub" not in said.err
