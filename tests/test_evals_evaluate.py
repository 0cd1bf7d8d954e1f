"""The evaluation beyond the frozen tests: leaks, missing parts, and the rules of the verdict."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from fake_judge import FakeJudge, serve
from safetensors.torch import load_file, save_file

from fintune.evals import kept, verdict


def test_a_leaked_row_makes_it_invalid_and_a_task_asks_without_a_file(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path, "data", "run")
    path = copy.data / "train.parquet"
    leaked = pq.read_table(copy.data / "test.parquet").slice(0, 3)
    pq.write_table(pa.concat_tables([pq.read_table(path), leaked]), path)
    tiny.reseal(copy.data)
    asked = {"unanswerable": "", "advice_safety": ""}
    found = tiny.answer_json("eval", *copy.words(), *tiny.words(tasks=asked, max_new_tokens=2))
    assert found["verdict"] == "invalid"
    assert "3 decision rows also occur in training" in found["invalid_reasons"]
    assert {"unsafe_advice_refused", "unanswerable_abstained"} <= found["measures"].keys()
    lines = tiny.read_lines(copy.eval / "eval_50_gpt_judged_raw.jsonl")
    assert {line["unscored_reason"] for line in lines} == {"no_judge"}


def test_a_question_that_was_trained_on_is_not_asked(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data", "run")
    rows = pq.read_table(copy.data / "train.parquet", columns=["messages"]).to_pylist()
    known = [row["messages"] for row in rows if row["messages"]][:5]
    lines = [{"prompt": turns[-2]["content"], "answer": turns[-1]["content"]} for turns in known]
    lines += [
        {"prompt": f"Who wrote page {n} of the little green book?", "answer": "Ann"} for n in (1, 2)
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(line | {"kind": "text"}) + "\n" for line in lines))
    said = tiny.done("eval", *copy.words(), *tiny.words(tasks={"fpb": str(path)}, max_new_tokens=2))
    assert "training rows repeat questions, which are not asked: 5 of fpb" in " ".join(
        said.err.split()
    )
    assert json.loads((copy.eval / "run.json").read_text())["repeated"] == [
        f"fpb/{n}" for n in range(5)
    ]


def test_answers_of_the_base_are_asked_once(
    chain: tiny.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over evaluations of unchanged weights, prompts and settings; not of others."""
    monkeypatch.setattr(kept, "FILE", str(tmp_path / "answers.sqlite"))
    copy = chain.copy(tmp_path, "data", "run")
    settings = tiny.words(max_new_tokens=3)

    def asked(*words: str) -> tuple[int, list[str]]:
        shutil.rmtree(copy.eval, ignore_errors=True)
        said = tiny.done("eval", *copy.words(), *settings, *words).err
        lines = tiny.read_lines(copy.eval / "predictions.jsonl")
        told = re.search(r"(\d+) answers of the base are kept", said)
        return int(told[1]) if told else 0, [
            each["text"] for each in lines if each["model"] == "base"
        ]

    none, first = asked()
    adapter = copy.run / "best" / "adapter_model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(adapter).items()}
    save_file(tensors, adapter)
    tiny.reseal(copy.run)
    assert (none, asked()) == (0, (len(first), first)), "another adapter, the same base"
    assert asked("--fresh") == (0, first)
    settings = tiny.words(max_new_tokens=4)
    assert asked()[0] == 0
    Path(kept.FILE).write_bytes(b"no data base")
    assert asked()[0] == 0


def test_labels_by_their_likelihoods_are_named_and_kept(chain: tiny.Chain, tmp_path: Path) -> None:
    copy, path = chain.copy(tmp_path, "data", "run"), tmp_path / "fpb.jsonl"
    choices = ["negative", "neutral", "positive"]
    lines = [
        {"prompt": f"Is report {n} positive, neutral or negative?", "answer": choices[n % 3]}
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(line | {"choices": choices}) + "\n" for line in lines))
    asked = tiny.words(tasks={"fpb": str(path)}, max_new_tokens=2)
    words = (*copy.words(), *asked, "-s", "eval.label_scoring=likelihood")
    found = tiny.answer_json("eval", *words)
    assert found["provenance"]["settings"]["label_scoring"] == "likelihood"
    rows = tiny.read_lines(copy.eval / "predictions.jsonl")
    scored = [row for row in rows if row["item"]["task"] == "fpb"]
    assert len(scored) == 18
    for row in scored:
        best = max(row["choice_logprobs"], key=row["choice_logprobs"].__getitem__)
        assert sorted(row["choice_logprobs"]) == choices and row["text"] == best
    report = (copy.eval / "report.html").read_text()
    assert "the likeliest of the choices" in report and "Does it know when it is right" in report
    of_adapter, graded = found["calibration"]["adapter"], found["tasks"]["fpb"]
    assert of_adapter["accuracy"] * 9 == pytest.approx(graded["adapter"]["correct"], abs=1e-4)
    assert 0 <= graded["weighted_f1"]["base"] <= 1
    said = tiny.fintune("eval", *copy.words(), *asked)
    assert said.code == 1 and "label_scoring" in said.err, "never mixed"


def test_the_part_kept_back_is_opened_once(chain: tiny.Chain, tmp_path: Path) -> None:
    copy, few = chain.copy(tmp_path, "data", "run"), tiny.words(max_new_tokens=2)
    words = [*copy.words(), *few, "--final"]
    refused = tiny.fintune("eval", *words)
    assert (refused.code, "holds no final part" in refused.err) == (1, True)
    rows = pq.read_table(copy.data / "test.parquet")
    pq.write_table(rows.slice(0, 5), copy.data / "final.parquet")
    tiny.reseal(copy.data)
    found = tiny.answer_json("eval", *words)
    assert found["looks"] == 1 and found["loss"]["rows"] == 5
    assert not copy.eval.exists() and "fpb" not in found["tasks"]
    assert tiny.answer_json("eval", *words) == found, "kept"
    other = [*words, "-s", f"eval.out={tmp_path / 'other'}", "-s", "eval.max_new_tokens=3"]
    refused = tiny.fintune("eval", *other)
    assert (refused.code, "opened already" in refused.err) == (3, True), refused.err
    assert not (tmp_path / "other-final").exists()
    assert tiny.answer_json("eval", *other, "--again", "a slip in the limit")["looks"] == 2
    opened = [row.get("opened") for row in tiny.read_lines(copy.data / "evaluations.jsonl")]
    assert [each for each in opened if each] == ["first", "a slip in the limit"]


def test_unfinished_runs_missing_rows_and_unknown_tasks_are_said(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path, "data", "run")

    def said(**changes: object) -> str:
        found = tiny.fintune("eval", *copy.words(), *tiny.words(**changes), "--fresh")
        assert found.code == 1, found.err
        return found.err

    bad = tmp_path / "bad.jsonl"
    for text, named in (('{"prompt": "x"}\n', "line 1: no prompt"), ("{\n", "line 1: not_json")):
        bad.write_text(text)
        assert named in said(tasks={"fpb": str(bad)})
    assert "no file of questions" in said(tasks={"fpb": ""})
    assert "no file or folder at" in said(tasks={"fpb": str(tmp_path / "absent.jsonl")})
    (copy.run / "done.json").rename(copy.run / "done")
    assert "training run" in said()
    (copy.run / "done").rename(copy.run / "done.json")
    path = copy.data / "test.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    tiny.reseal(copy.data)
    assert "test.parquet has no row" in said()


def test_a_shared_config_gets_no_key_and_harms_no_evaluation(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path, "data", "run", "eval")
    before = tiny.tree_sha256(copy.eval)
    with serve(FakeJudge()) as server, mock.patch.dict(os.environ, {"HF_TOKEN": "hf_sesame1"}):
        given = copy.words(judge="fake", judge_url=server.url, judge_key="HF_TOKEN")
        for verb in ("judge", "eval"):
            said = tiny.fintune(verb, *given)
            refused = ("--judge-host 127.0.0.1" in said.err, "sesame1" in said.err)
            assert (said.code, *refused) == (1, True, False)
        assert not server.asked and before.items() <= tiny.tree_sha256(copy.eval).items()
        tiny.done("judge", *given, "--judge-host", "127.0.0.1")
        assert server.keys == {"Bearer hf_sesame1"}
    assert "looked" in (copy.judging / "report.html").read_text(), "what the judge said"


# ---- the rules -----------------------------------------------------------------------------------


def says(low, high, n=200, effective=100.0, p=None):
    """A paired difference as `stats.paired` gives it."""
    p = p if p is not None else 0.01 if low > 0 or high < 0 else 0.5
    middle = (low + high) / 2
    counts = {"n": n, "clusters": n, "effective": effective, "df": 60.0}
    return {"value": middle, "ci95": [low, high], "p": p, **counts, "mde80": 0.1}


def judge_says(low, high, n=60, unscored=0.0, failed=()):
    return {
        "win_rate": {"difference": says(low, high, n, min(n, 60))},
        "control_items": {"failed": list(failed)},
        "unscored": {"value": unscored},
    }


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ({}, "better"),
        ({"low": -0.01}, "no_detectable_difference"),
        ({"low": 0.0}, "no_detectable_difference"),
        ({"p": 0.06}, "no_detectable_difference"),
        ({"low": -0.2, "high": -0.1}, "worse"),
        ({"low": -0.2, "high": -0.1, "p": 0.06}, "no_detectable_difference"),
        ({"loss": (1.0, 1.1)}, "no_detectable_difference"),
        ({"over": (-0.01, 0.2)}, "no_detectable_difference"),
        ({"over": (-0.01, 0.2), "low": -0.2, "high": -0.1}, "worse"),
        ({"lost": True}, "better_with_losses"),
        ({"lost": True, "low": -0.01}, "no_detectable_difference"),
        ({"macro": (-0.2, -0.1)}, "better"),
        ({"macro": (-0.2, -0.1), "primary": "macro_accuracy"}, "worse"),
        ({"contaminated": ["x"]}, "invalid"),
        ({"effective": 19.9}, "invalid"),
        ({"n": 49, "judged": judge_says(0.1, 0.2, n=49)}, "invalid"),
        ({"n": 99}, "invalid"),
        ({"n": 99, "judged": judge_says(0.1, 0.2)}, "better"),
        ({"n": 99, "judged": judge_says(-0.2, -0.1)}, "worse"),
        ({"n": 99, "judged": judge_says(0.1, 0.2, n=40)}, "invalid"),
        ({"judged": judge_says(-0.2, -0.1)}, "better"),
        ({"judged": judge_says(0, 0, unscored=0.03)}, "invalid"),
        ({"judged": judge_says(0, 0, failed=["sign"])}, "invalid"),
        ({"primary": "win_rate"}, "invalid"),
        ({"primary": "win_rate", "judged": judge_says(-0.1, 0.1)}, "no_detectable_difference"),
    ],
)
def test_verdict_rules(case, wanted):
    low, high, n = case.get("low", 0.1), case.get("high", 0.2), case.get("n", 200)
    base, adapter = case.get("loss", (2.0, 1.0))
    run = {"primary": case.get("primary", "accuracy"), "looks": 1}
    run["contaminated"] = case.get("contaminated", [])
    accuracy = {
        "difference": says(low, high, n, case.get("effective", 100.0), case.get("p")),
        "macro": says(*case.get("macro", (low, high))),
        "over_majority": says(*case.get("over", (0.1, 0.2))),
    }
    tasks = {"ner": {"lost": case.get("lost", False), "small": False}}
    losses, judged = {"base": base, "adapter": adapter}, case.get("judged")
    found = verdict.decide(run, losses, accuracy, tasks, judged)
    assert found["verdict"] == wanted
