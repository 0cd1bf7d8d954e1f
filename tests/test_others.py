"""Adapters of other trainers, and merged models: judged and released without a run of ours."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_hub
import torch
from hub.server import Hub
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ANSWERS = ("negative", "neutral", "positive")


def trained(base: Path, folder: Path, **lora: Any) -> Path:
    """A peft folder by transformers and peft alone: eight steps of AdamW on labels."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    shape: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**shape | {"lora_alpha": 16} | lora)
    )
    steps = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    rows = tiny.read_lines(tiny.questions())
    for row in rows[:8]:
        turns = [{"role": "user", "content": row["prompt"]}]
        turns += [{"role": "assistant", "content": row["answer"]}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True).input_ids
        model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny.base(), tmp_path_factory.mktemp("others") / "mine", task_type="CAUSAL_LM")


def few(*more: str) -> list[str]:
    """Settings that make an evaluation small."""
    return [*tiny.words(tasks=tiny.tasks(), max_new_tokens=3, eval_batch_size=64), *more]


def words(adapter: Path, out: Path, *more: str) -> list[str]:
    return ["--adapter", str(adapter), "-s", f"out={out}", *few(*more)]


@pytest.fixture(scope="module")
def judged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of the plain adapter, without data of ours."""
    out = tmp_path_factory.mktemp("judged") / "mine"
    tiny.done("eval", *words(adapter, out))
    return out


def test_an_adapter_of_plain_peft_is_judged_without_a_run(judged: Path, adapter: Path) -> None:
    found = json.loads((judged / "eval" / "test_results.json").read_text())
    assert found["loss"]["adapter"] is None and found["n"]["checkable"] == 110
    assert "held_out_loss" not in found["guards"] and "majority_class" in found["guards"]
    subject = found["provenance"]["subject"]
    assert "is not known" in subject["decontamination"]
    shown = tiny.done("show", judged)
    assert "held-out loss not measured" in shown.out and "--train-rows" in shown.out
    page = (judged / "eval" / "report.html").read_text()
    assert "is not known, nor whether these questions are among it" in page
    before = tiny.tree_sha256(judged / "eval")
    again = tiny.done("eval", *words(adapter, judged))
    assert "unchanged, kept" in again.err
    tiny.done("eval", "--rescore", judged / "eval")
    assert tiny.tree_sha256(judged / "eval") == before
    assert tiny.answer_json("runs", judged.parent)[0]["state"] == "evaluated"
    compared = tiny.answer_json("compare", judged, judged)
    assert compared["verdict"] == "no_detectable_difference" and compared["loss"] is None


def test_its_training_rows_are_not_asked_and_prepared_rows_measure_the_loss(
    chain: tiny.Chain, adapter: Path, tmp_path: Path
) -> None:
    asked, rows = tiny.read_lines(tiny.questions()), tmp_path / "rows.jsonl"
    known = [{"prompt": row["prompt"], "completion": row["answer"]} for row in asked[:4]]
    texts = [{"text": f"User: {row['prompt']} Assistant: {row['answer']}"} for row in asked[4:6]]
    rows.write_text("".join(json.dumps(row) + "\n" for row in known + texts))
    copy = chain.copy(tmp_path / "copy", "data")
    given = ("--data", str(copy.out), "--train-rows", str(rows))
    found = tiny.answer_json("eval", *words(adapter, tmp_path / "out", *given))
    run = json.loads((tmp_path / "out" / "eval" / "run.json").read_text())
    assert {f"fpb/{row.get('id', at)}" for at, row in enumerate(asked[:6])} <= {*run["repeated"]}
    told = found["provenance"]["subject"]["decontamination"]
    assert (
        "6 training rows of rows.jsonl were compared" in told
        and "6 are repeated and not asked" in told
    )
    assert found["loss"]["tokens"] > 0 and "held_out_loss" in found["guards"]
    ours = json.loads((chain.eval / "test_results.json").read_text())
    assert found["loss"]["base"] == ours["loss"]["base"], "rows encoded anew have the same loss"
    lines = tiny.read_lines(copy.data / "evaluations.jsonl")
    assert lines[-1]["adapter"] == tiny.file_sha256(adapter / "adapter_model.safetensors")


def test_a_merged_model_is_judged_against_its_base(
    judged: Path, adapter: Path, tmp_path: Path
) -> None:
    """Its answers are the adapter's, and the base's are kept or the same."""
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base()), adapter)
    whole.merge_and_unload().save_pretrained(tmp_path / "merged")
    given = ["--model", str(tmp_path / "merged"), "--base", str(tiny.base())]
    given += ["-s", f"out={tmp_path / 'out'}", *few()]
    said = tiny.fintune("eval", *given)
    assert (said.code, "holds no tokenizer" in said.err) == (1, True), said.err
    AutoTokenizer.from_pretrained(tiny.base()).save_pretrained(tmp_path / "merged")
    tiny.done("eval", *given)
    folders = (tmp_path / "out" / "eval", judged / "eval")
    rows = ([(r["model"], r["item"]["id"], r["text"]) for r in answers(f)] for f in folders)
    assert next(rows) == next(rows)
    page = (folders[0] / "report.html").read_text()
    assert "the base first, then the merged model" in page


def answers(folder: Path) -> list[dict[str, Any]]:
    return tiny.read_lines(folder / "predictions.jsonl")


def test_a_killed_evaluation_continues(adapter: Path, judged: Path, tmp_path: Path) -> None:
    given, out = words(adapter, tmp_path / "out"), tmp_path / "out" / "eval"
    shutil.copytree(judged / "eval", out)
    (out / "inputs.json").write_text(
        json.dumps({"inputs": json.loads((out / "done.json").read_text())["inputs"]})
    )
    (out / "done.json").unlink()
    lines = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    (out / "predictions.jsonl").write_text("".join(lines[:31]) + lines[31][:40])
    tiny.done("eval", *given)
    names = ("predictions.jsonl", "test_results.json")
    assert [(out / n).read_text() for n in names[:1]] == [
        (judged / "eval" / n).read_text() for n in names[:1]
    ]
    other = tiny.fintune("eval", *given, "-s", "eval.max_new_tokens=4")
    assert other.code == 1 and "max_new_tokens: 3 -> 4" in other.err
    assert tiny.done("eval", *given, "--fresh") and (out.parent / "eval.old-1").is_dir()


def _config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _pickled(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()


def _renamed(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = {name.replace("layers.1.", "layers.7."): t for name, t in load_file(weights).items()}
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (_config(r=8), 3, "another shape than the base needs"),
        (_renamed, 3, "keys: missing key"),
        (_pickled, 1, "holds no weights .*pickled weights .* are never read"),
        (_config(base_model_name_or_path=None), 1, "does not name its base.*--base ID"),
        (_config(base_model_name_or_path="/nowhere/base"), 1, "/nowhere/base is neither here nor"),
        (_config(revision="a" * 64), 3, "trained on another base"),
        (_config(auto_map={"A": "b.C"}), 3, "asks to import code"),
        (lambda folder: (folder / "adapter_config.json").unlink(), 1, "base|holds no adapter"),
        (shutil.rmtree, 1, "no folder at"),
    ],
)
def test_what_does_not_fit_is_named_before_any_work(
    adapter: Path, tmp_path: Path, change: Callable[[Path], object], code: int, named: str
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(adapter, folder)
    change(folder)
    said = tiny.fintune("eval", *words(folder, tmp_path / "out"))
    assert said.code == code and re.search(named, " ".join(said.err.split())), said.err
    assert not (tmp_path / "out").exists() and "Traceback" not in said.err


def test_options_that_do_not_belong_together(adapter: Path, tmp_path: Path) -> None:
    assert tiny.fintune("eval", "--base", "a/b").code == 2
    assert tiny.fintune("eval", "--train-rows", "rows.jsonl").code == 2
    assert tiny.fintune("eval", "--adapter", adapter, "--model", adapter).code == 2
    nothing = tiny.fintune("eval", "--adapter", adapter, "-s", f"out={tmp_path}/out")
    assert nothing.code == 1 and "nothing to ask" in nothing.err
    absent = words(adapter, tmp_path / "out", "--train-rows", str(tmp_path / "absent.csv"))
    assert tiny.fintune("eval", *absent).code == 1


def test_it_is_released_with_what_is_known(judged: Path, adapter: Path, tmp_path: Path) -> None:
    given = (*words(adapter, judged), "-s", f"release.out={tmp_path / 'r'}")
    refused = tiny.fintune("release", *given)
    assert refused.code == 3 and "not 'better'" in refused.err
    tiny.done("release", *given, "--accept", tiny.REASON)
    card, risk = ((tmp_path / "r" / name).read_text() for name in ("README.md", "model_risk.md"))
    assert "| epochs, batch, optimizer, learning rate, longest example, seed | not stated |" in card
    assert "trained by another tool and judged here" in card and "rank 4" in card
    for text in (card, risk):
        assert "What trained it, how long and on which machine: not stated." in text
        assert "is not known, nor whether these questions are among it" in text
        assert "| energy of training | not stated |" in text
    assert not (tmp_path / "r" / "fintune.yaml").exists()
    facts = json.loads((tmp_path / "r" / "training_config.json").read_text())
    assert facts["config"] == facts["training_arguments"] == "not stated"
    said = tiny.done("verify", tmp_path / "r", "--base", tiny.base())
    assert "verified" in said.out


def test_a_release_is_of_the_adapter_that_was_judged(
    judged: Path, adapter: Path, tmp_path: Path
) -> None:
    for change, named in ((_config(lora_alpha=32), "adapter_config.json"), (_doubled, "another")):
        folder = tmp_path / named
        shutil.copytree(adapter, folder)
        change(folder)
        given = words(folder, judged, "--accept", tiny.REASON)
        said = tiny.fintune("release", *given, "-s", f"release.out={tmp_path / 'r'}")
        assert said.code == 3 and named in said.err, said.err


def _doubled(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)


def test_peft_without_a_task_type_and_a_tokenizer_beside_it(tmp_path: Path) -> None:
    """As `get_peft_model(model, LoraConfig(r=4))` saves it; its template writes the prompts."""
    folder = trained(tiny.base(), tmp_path / "theirs", target_modules="all-linear")
    assert json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]
    tokenizer = AutoTokenizer.from_pretrained(tiny.base())
    tokenizer.chat_template = tokenizer.chat_template.replace("Cutting Knowledge", "Knowledge")
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    said = tiny.done("eval", *words(folder, out), "-s", "eval.max_items=20")
    assert "not by the base's" in said.err
    tiny.done("release", *words(folder, out), "-s", "eval.max_items=20")
    template = (out / "release" / "chat_template.jinja").read_text()
    assert "Cutting" not in template
    tiny.done("verify", out / "release", "--base", tiny.base())
    tokenizer.add_tokens(["loss"])
    tokenizer.save_pretrained(folder)
    refused = tiny.fintune("eval", *words(folder, tmp_path / "other"))
    assert refused.code == 3 and "gives other ids than its base's" in refused.err


# ---- the form that is served ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["merged:fp32", "4bit"])
def test_a_form_is_held_against_the_adapter_as_trained(
    adapter: Path, judged: Path, tmp_path: Path, form: str
) -> None:
    out, name = tmp_path / "out", form.replace(":", "-")
    shutil.copytree(judged / "eval", out / "eval")
    before = tiny.tree_sha256(out / "eval")
    given = (*words(adapter, out), "--form", form)
    found = tiny.answer_json("eval", *given)
    place = out / "eval" / "forms" / name
    said = {row["id"]: row["text"] for row in answers(place)}
    trained = {r["item"]["id"]: r["text"] for r in answers(out / "eval") if r["model"] == "adapter"}
    assert said.keys() == trained.keys()
    equal = sum(said[key] == trained[key] for key in said)
    assert found["equal"]["k"] == equal and found["equal"]["n"] == 110
    assert (equal == 110) == (form == "merged:fp32")
    assert before.items() <= tiny.tree_sha256(out / "eval").items(), "no file of it is changed"
    assert (place / "report.html").is_file()
    shown = tiny.done("show", out)
    assert f"{name}: {equal / 110:.1%}" in shown.out
    assert "unchanged, kept" in tiny.done("eval", *given).err
    rows = (place / "predictions.jsonl").read_text().splitlines(keepends=True)
    (place / "predictions.jsonl").write_text("".join(rows[1:]))
    refused = tiny.fintune("eval", *given)
    assert refused.code == 1 and "predictions.jsonl was changed" in refused.err
    (place / "predictions.jsonl").write_text("".join(rows))
    tiny.done("release", *words(adapter, out), "--accept", tiny.REASON)
    card = (out / "release" / "README.md").read_text()
    assert (
        "### As it is served" in card and f"| {name} | {equal / 110:.1%}".replace("%", " %") in card
    )
    tiny.done("verify", out / "release", "--base", tiny.base())


def test_a_form_of_a_run_continues_where_it_was_killed(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data", "run", "eval")
    given = (*copy.words(), "--form", "merged:fp32")
    tiny.done("eval", *given)
    place = copy.eval / "forms" / "merged-fp32"
    whole = sorted((place / "predictions.jsonl").read_text().splitlines())
    inputs = json.loads((place / "done.json").read_text())["inputs"]
    (place / "inputs.json").write_text(json.dumps({"inputs": inputs}))
    (place / "done.json").unlink()
    (place / "predictions.jsonl").write_text("\n".join(whole[:9]) + "\n" + whole[9][:20])
    tiny.done("eval", *given)
    assert sorted((place / "predictions.jsonl").read_text().splitlines()) == whole
    tiny.done("eval", *given, "--fresh")
    assert (place.parent / "merged-fp32.old-1").is_dir() and not (copy.out / "eval.old-1").exists()


def test_a_form_that_is_none_is_told_before_any_answer(
    adapter: Path, judged: Path, tmp_path: Path
) -> None:
    for form, code, named in (
        ("8bit", 2, "no form"),
        ("merged:f16", 2, "no form"),
        (f"gguf:{tmp_path}/absent.gguf", 1, "no GGUF file at"),
    ):
        said = tiny.fintune("eval", *words(adapter, tmp_path / "out"), "--form", form)
        assert (said.code, named in said.err) == (code, True), said.err
    assert not (tmp_path / "out").exists()


def test_the_three_commands_of_the_page_run(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/evaluation.md, as it stands, against a hub on loopback that has the base."""
    page = (tiny.ROOT / "docs" / "evaluation.md").read_text()
    section = page.partition("## I trained with another tool")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert [line[:2] for line in lines] == [["fintune", v] for v in ("eval", "release", "verify")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    shutil.copytree(adapter, "my-adapter")
    shutil.copy(tiny.questions(), "fpb.jsonl")
    rows = tiny.read_lines(tiny.questions())[:3]
    text = "".join(json.dumps({"user": r["prompt"], "assistant": r["answer"]}) + "\n" for r in rows)
    Path("train.jsonl").write_text(text)
    with Hub(tmp_path / "served") as hub, tiny_hub.client(hub, tmp_path / "home", ""):
        named = {path.name: path for path in tiny.base().iterdir()}
        hub.commit("model", "HuggingFaceTB/SmolLM2-135M-Instruct", named)
        said = [
            tiny.done(*line[1:], *(["-s", "eval.max_new_tokens=3"] * (line[1] == "eval")))
            for line in lines
        ]
    assert "3 training rows of train.jsonl were compared" in " ".join(said[0].err.split())
    assert ": verified" in said[2].out
