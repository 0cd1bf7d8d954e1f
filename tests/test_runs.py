"""Runs side by side: listed, shown again, compared over the same questions."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """What `fintune runs` lists, by name."""
    return {row["name"]: row for row in tiny.answer_json("runs", folder)}


def rewrite(evaluation: Path, change: Any) -> None:
    """The kept answers, each line changed, and the evaluation sealed and scored again."""
    path = evaluation / "predictions.jsonl"
    lines = [change(line) for line in tiny.read_lines(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line))
    tiny.reseal(evaluation)
    tiny.done("eval", "--rescore", evaluation)


def test_two_rates_over_one_data_folder_are_listed_and_compared(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    first = chain.copy(tmp_path / "first", "data", "run", "eval")
    words = [*tiny.chain(tmp_path / "slow", tasks=tiny.tasks(), learning_rate=0.0001)]
    kept = tiny.done("run", *words, "--data", first.out, "--accept", tiny.REASON)
    assert f"{first.data}: unchanged, kept" in kept.err
    assert not (tmp_path / "slow" / "data").exists()
    listed = rows(tmp_path)
    assert [listed[name]["learning_rate"] for name in ("first", "slow")] == [0.01, 0.0001]
    assert [listed[name]["state"] for name in ("first", "slow")] == ["evaluated", "released"]
    assert listed["first"]["rows"] == listed["slow"]["rows"] > 0
    assert list(listed) == ["slow", "first"], "the newest first"
    told = json.loads((tmp_path / "slow" / "eval" / "test_results.json").read_text())
    assert listed["slow"]["loss"] == told["loss"]["adapter"] != listed["first"]["loss"]
    assert listed["slow"]["verdict"] == told["verdict"]

    found = tiny.answer_json("compare", first.out, tmp_path / "slow")
    assert found["differs"] == ["run.train.learning_rate: 0.01 -> 0.0001"]
    before = json.loads((first.eval / "test_results.json").read_text())
    assert found["accuracy"] == {
        "a": before["accuracy"]["adapter"],
        "b": told["accuracy"]["adapter"],
    }
    assert found["loss"] == [before["loss"]["adapter"], told["loss"]["adapter"]]
    assert (found["looks"], found["bases"]) == (2, None)
    assert found["primary"]["n"] == told["primary"]["n"]


def test_statistics_are_the_verdicts(chain: tiny.Chain, tmp_path: Path) -> None:
    """An adapter that answers as its base does is to the other what the base was to it."""
    same = chain.copy(tmp_path / "same", "run", "eval")
    base = {
        line["item"]["id"]: line["text"]
        for line in tiny.read_lines(same.eval / "predictions.jsonl")
        if line["model"] == "base"
    }
    rewrite(same.eval, lambda line: line | {"text": base[line["item"]["id"]]})
    before = json.loads((chain.eval / "test_results.json").read_text())
    page = tmp_path / "page.html"
    found = tiny.answer_json("compare", same.out, chain.out, "--html", page)
    assert found["primary"] == before["primary"]
    assert found["tasks"].keys() == before["tasks"].keys()
    for name, task in found["tasks"].items():
        assert task["difference"] == before["tasks"][name]["difference"]
        assert (task["a"], task["b"]) == (
            before["tasks"][name]["base"],
            before["tasks"][name]["adapter"],
        )
    points = [task["difference"]["value"] for task in found["tasks"].values()]
    assert points == sorted(points), "the worst first"
    assert found["verdict"] == "better", "no guard of a base holds between adapters"
    assert found["sentences"][0] == f"{chain.out} is better than {same.out}."
    back = tiny.answer_json("compare", chain.out, same.out)
    assert (back["verdict"], back["primary"]["value"]) == ("worse", -found["primary"]["value"])

    text = page.read_text(encoding="utf-8")
    gained = sum(
        pair["base"] is False and pair["adapter"] is True for pair in right(chain).values()
    )
    assert f"Only {chain.out} is right: {gained}" in text and gained > 0
    assert text.count("<details class=item>") == gained + sum(
        pair["base"] is True and pair["adapter"] is False for pair in right(chain).values()
    )
    said = tiny.done("compare", same.out, chain.out).out.splitlines()
    assert said[0] == found["sentences"][0]
    table = [line.split()[0] for line in said if line.startswith(tuple(found["tasks"]))]
    assert table == list(found["tasks"])


def right(chain: tiny.Chain) -> dict[str, dict[str, bool]]:
    """By question which variant is right, by the product's own grading."""
    from fintune.evals.grading import load_pairs

    return {
        pair.item.id: {
            who: graded is not None and graded.correct for who, graded in pair.graded.items()
        }
        for pair in load_pairs(chain.eval)
    }


def test_other_questions_or_prompts_are_refused(chain: tiny.Chain, tmp_path: Path) -> None:
    fewer = chain.copy(tmp_path / "fewer", "eval")
    gone = {line["item"]["id"] for line in tiny.read_lines(fewer.eval / "predictions.jsonl")[:8]}
    rewrite(fewer.eval, lambda line: line if line["item"]["id"] not in gone else None)
    tiny.reseal(fewer.eval, test="another")
    said = tiny.fintune("compare", fewer.out, chain.out)
    assert (said.code, said.out) == (1, "")
    assert f"4 of the 113 questions of {fewer.out} and {chain.out} differ" in said.err
    assert "test: another -> " in said.err and "--data DIR" in said.err

    other = chain.copy(tmp_path / "other", "eval")
    rewrite(other.eval, lambda line: line | {"prompt_sha256": "0" + line["prompt_sha256"]})
    tiny.reseal(other.eval, chat={"date_string": "1 Jan 2030"})
    said = tiny.fintune("compare", chain.out, other.out)
    assert said.code == 1 and "113 of the 113 prompts" in said.err
    assert "chat.date_string: 26 Jul 2024 -> 1 Jan 2030" in said.err


def test_bases_that_differ_are_compared_too(chain: tiny.Chain, tmp_path: Path) -> None:
    other = chain.copy(tmp_path / "other", "eval")
    answers = {
        (line["model"], line["item"]["id"]): line["text"]
        for line in tiny.read_lines(other.eval / "predictions.jsonl")
    }
    swap = {"base": "adapter", "adapter": "base"}
    rewrite(
        other.eval,
        lambda line: line | {"text": answers[swap[line["model"]], line["item"]["id"]]},
    )
    tiny.reseal(other.eval, base="test/other")
    found = tiny.answer_json("compare", chain.out, other.out)
    assert found["bases"]["value"] == -found["primary"]["value"] > 0
    assert "base: test/tiny -> test/other" in found["differs"]
    said = tiny.done("compare", chain.out, other.out).out
    assert f"Their bases alone: +{100 * found['bases']['value']:.1f} points" in said


def test_a_verdict_is_said_again(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path / "runs" / "mine", "eval")
    verdict = chain.said["eval"].err.splitlines()[-3:]
    shown = tiny.done("show", copy.out).out.splitlines()
    assert [line for line in verdict if line in shown] == verdict
    assert shown[0].startswith("base: accuracy ") and "held-out loss" in shown[1]
    assert tiny.done("eval", "--rescore", copy.eval).err.splitlines() == shown
    kept = json.loads((copy.eval / "test_results.json").read_text())
    assert tiny.answer_json("show", copy.eval) == kept
    (copy.eval / "done.json").unlink()
    said = tiny.fintune("show", copy.out)
    assert said.code == 1 and "unfinished" in said.err
    nowhere = tiny.fintune("show", tmp_path / "nowhere")
    assert nowhere.code == 1 and "no evaluation in" in nowhere.err


def test_states_are_told_from_the_files(chain: tiny.Chain, tmp_path: Path) -> None:
    chain.copy(tmp_path / "released", "data", "run", "eval", "release")
    chain.copy(tmp_path / "trained", "data", "run")
    chain.copy(tmp_path / "prepared", "data")
    again = chain.copy(tmp_path / "again", "data", "run", "eval")
    (again.run / "best" / "adapter_model.safetensors").write_bytes(b"another")
    tiny.reseal(again.run)
    stopped = chain.copy(tmp_path / "stopped", "data", "run")
    (stopped.run / "done.json").unlink()
    failed = chain.copy(tmp_path / "failed", "data", "run")
    (failed.run / "done.json").unlink()
    with (failed.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 27, "loss": 1.0}\n{"step": 2')
    running = chain.copy(tmp_path / "running", "data", "run")
    (running.run / "done.json").unlink()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / ".data.lock").write_text("process 1 since then")
    (tmp_path / "photos").mkdir()
    with (tmp_path / "running" / ".run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        listed = rows(tmp_path)
    assert {name: row["state"] for name, row in listed.items()} == {
        "released": "released",
        "trained": "trained",
        "prepared": "prepared",
        "again": "trained again after eval",
        "stopped": "stopped at step 24, saved: 24",
        "failed": "failed at step 27, saved: 24",
        "running": "training, step 24",
        "nothing": "failed, nothing written",
        "photos": "not a run",
    }
    assert listed["again"]["verdict"] is None, "a verdict of another adapter"
    assert rows(tmp_path)["running"]["state"] == "stopped at step 24, saved: 24"
    assert listed["trained"]["rows"] == listed["prepared"]["rows"] == 64
    tiny.reseal(tmp_path / "trained" / "data")
    (tmp_path / "trained" / "data" / "train.parquet").write_bytes(b"prepared again")
    tiny.reseal(tmp_path / "trained" / "data")
    assert rows(tmp_path)["trained"]["rows"] is None, "not the rows that it was trained on"


DAMAGES = {
    "run/done.json": ["{", "[1]", '{"inputs": 3}', "\x00", "[" * 100_000],
    "run/config.yaml": ["a: [", "x: 1", "\x1b[2J: 1"],
    "run/metrics.jsonl": ["no\n", '{"step": "x"}\n', "[]\n"],
    "data/manifest.json": ["{", '{"rows": 3}', '{"rows": {"train": "many"}}'],
    "data/done.json": ["", "null"],
    "eval/test_results.json": [
        "{",
        "{}",
        '{"loss": {"adapter": NaN}, "verdict": 3}',
        '{"loss": [], "verdict": "better"}',
    ],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_or_of_others_is_a_row(
    name: str, chain: tiny.Chain, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path / "runs" / "\x1b[31mred\n[bold]", "data", "run", "eval")
    if "metrics" in name:
        (copy.run / "done.json").unlink()
    for text in DAMAGES[name]:
        (copy.out / name).write_text(text)
        (row,) = tiny.answer_json("runs", tmp_path / "runs")
        assert row["state"].startswith("damaged, or of others: "), (text, row)
        shown = tiny.done("runs", tmp_path / "runs")
        assert "\x1b" not in shown.out and r"\x1b[31mred [bold]" in shown.out
        assert "Traceback" not in shown.err


def test_a_folder_that_is_none_is_said_and_the_page_has_its_place(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    said = tiny.fintune("runs", tmp_path / "none")
    assert said.code == 1 and "No such file" in said.err and "fintune runs DIR" in said.err
    assert tiny.done("runs", tmp_path).out == "no runs\n"
    copy = chain.copy(tmp_path / "copy", "eval")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "SHA256SUMS").touch()
    places = (copy.eval, tmp_path / "release")
    for page in (*(place / "page.html" for place in places), tmp_path / "rows.jsonl"):
        refused = tiny.fintune("compare", chain.out, copy.out, "--html", page)
        assert refused.code == 1 and not page.exists(), page


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_cuts_nothing(width: int, chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path / "a-run-with-quite-a-name", "data", "run", "eval")
    code = (
        "import sys; from fintune import cli, console\n"
        f"console.out._force_terminal, console.out.width = True, {width}\n"
        "for words in (['runs', '..'], ['compare', '.', '.'], ['show', '.']):\n"
        "    sys.argv = ['fintune', *words]\n"
        "    try: cli.main()\n"
        "    except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    env = {**os.environ, "TERM": "xterm"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=copy.out, env=env, capture_output=True, text=True, check=True)
    *lines, torch = done.stdout.splitlines()
    assert torch == "False"
    assert [line for line in lines if len(line) > width] == []
    text = " ".join(done.stdout.split())
    for word in ("a-run-with-quite-a-name", "64", "0.01", "no detectable difference", "evaluated"):
        assert word in text, word
    assert "…" not in text


def test_a_kept_stage_loads_no_torch_until_what_it_depends_on_changes(
    chain: tiny.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy, source = (
        chain.copy(tmp_path / "out", "data", "run", "eval", "release"),
        tmp_path / "rows.jsonl",
    )
    source.write_bytes(tiny.rows().read_bytes())
    words = {verb: [verb, *copy.words(source=str(source))] for verb in tiny.VERBS}
    words["release"] += ["--accept", tiny.REASON]
    code = (
        "import json, sys; from fintune import cli\n"
        "for words in json.loads(sys.argv.pop()).values():\n"
        "    sys.argv = ['fintune', *map(str, words)]\n"
        "    try: cli.main()\n"
        "    except SystemExit: pass\n"
        "    print('torch' in sys.modules)"
    )

    def torch_was_loaded(verbs: dict[str, list[str]]) -> list[str]:
        given = [sys.executable, "-c", code, json.dumps(verbs, default=str)]
        return subprocess.run(given, capture_output=True, text=True, check=True).stdout.split()

    for each in words.values():
        tiny.done(*each)
    assert torch_was_loaded(words) == ["False"] * 4
    assert "base: accuracy" in tiny.done(*words["eval"]).err
    (copy.run / "best" / "adapter_model.safetensors").write_bytes(b"another")
    said = tiny.fintune(*words["train"])
    assert (said.code, "was changed after it was finished" in said.err) == (1, True), said.err
    source.write_bytes(source.read_bytes() + b"\n")
    said = tiny.fintune(*words["prepare"])
    assert (said.code, "holds the finished result of other inputs" in said.err) == (1, True)
