"""Frozen: what an evaluation decides, from which files, and how the judge is asked."""

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import fake_judge
import frozen
import pytest
import tiny

CALLS = 12
"""Of three pairs in both orders, and six control items."""
KEY = "hunter2-hunter2-hunter2"


def same_numbers(found: Any, kept: Any, place: str = "") -> None:
    """Equal trees; numbers that are no counts within 1e-4, since they are rounded to six digits."""
    if isinstance(kept, dict):
        assert sorted(found) == sorted(kept), place
        for key in kept:
            same_numbers(found[key], kept[key], f"{place}.{key}")
    elif isinstance(kept, list) and len(kept) == len(found):
        for at, value in enumerate(kept):
            same_numbers(found[at], value, f"{place}.{at}")
    elif isinstance(kept, float):
        assert found == pytest.approx(kept, rel=1e-4, abs=1e-6), place
    else:
        assert found == kept, place


def test_the_results_are_the_frozen_ones(chain: tiny.Chain) -> None:
    results = frozen.read_json(chain.eval / "test_results.json")
    same_numbers(frozen.of_results(results), frozen.frozen()["results"])
    assert results["verdict"] == "no_detectable_difference"
    assert results["guards"] == {"held_out_loss": True, "majority_class": False}
    assert results["looks"] == 1
    assert results["judge"] is None


def test_what_is_counted_adds_up(chain: tiny.Chain) -> None:
    results = frozen.read_json(chain.eval / "test_results.json")
    n, accuracy = results["n"], results["accuracy"]
    assert sum(task["n"] for task in results["tasks"].values()) == n["checkable"] == 113
    for who in ("base", "adapter"):
        right = sum(task[who]["correct"] for task in results["tasks"].values())
        assert accuracy[who] == pytest.approx(right / n["checkable"], abs=1e-6)
        for task in results["tasks"].values():
            outcomes = ("correct", "wrong", "abstained", "unparsed")
            assert sum(task[who][outcome] for outcome in outcomes) == task["n"]
    low, high = results["primary"]["ci95"]
    assert 0 < low < results["primary"]["value"] < high
    lines = tiny.read_lines(chain.eval / "predictions.jsonl")
    assert len(lines) == 2 * n["items"]
    both = {line["prompt_sha256"] for line in lines if line["model"] == "base"}
    assert both == {line["prompt_sha256"] for line in lines if line["model"] == "adapter"}


def test_json_is_what_the_file_says(chain: tiny.Chain) -> None:
    before = {path: path.stat().st_mtime_ns for path in chain.eval.iterdir()}
    results = tiny.answer_json("eval", *chain.words())
    assert results == frozen.read_json(chain.eval / "test_results.json")
    assert {path: path.stat().st_mtime_ns for path in chain.eval.iterdir()} == before, "kept"


def test_rescoring_makes_the_same_bytes(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "eval")
    for name in ("test_results.json", "report.html"):
        (copy.eval / name).write_text("x" * (copy.eval / name).stat().st_size)
    tiny.done("eval", "--rescore", copy.eval)
    assert tiny.tree_sha256(copy.eval) == tiny.tree_sha256(chain.eval)


def test_an_evaluation_cut_off_goes_on_to_the_same_bytes(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data", "run", "eval")
    for name in ("done.json", "test_results.json", "report.html"):
        (copy.eval / name).unlink()
    lines = (copy.eval / "predictions.jsonl").read_bytes()
    (copy.eval / "predictions.jsonl").write_bytes(lines[: len(lines) // 3])
    refused = tiny.fintune("release", *copy.words())
    assert (refused.code, "unfinished" in refused.err) == (1, True)
    tiny.done("eval", *copy.words())
    found = tiny.tree_sha256(copy.eval)
    for name, digest in tiny.tree_sha256(chain.eval).items():
        # The seal names what was cut off too, which is kept beside.
        assert found[name] == digest or name == "done.json", name


def test_another_setting_is_refused_by_name(chain: tiny.Chain) -> None:
    said = tiny.fintune("eval", *chain.words(max_new_tokens=9))
    assert (said.code, "max_new_tokens: 8 -> 9" in said.err) == (1, True), said.err


def test_a_task_that_does_not_exist_is_refused_with_those_that_do(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path, "data", "run")
    said = tiny.fintune("eval", *copy.words(), *tiny.words(tasks={"fpbb": "x.jsonl"}))
    assert (said.code, "fpb, headline" in said.err) == (1, True), said.err


# ---- the judge -------------------------------------------------------------------------------


@pytest.fixture
def judged(chain: tiny.Chain, tmp_path: Path) -> tiny.Chain:
    """A copy of the chain for a judge of its own."""
    return chain.copy(tmp_path / "judged", "data", "run", "eval")


def ask(
    judge: fake_judge.FakeJudge, judged: tiny.Chain, *words: object, verb: str = "judge"
) -> tiny.Said:
    """`fintune judge` against the fake endpoint, or `eval`, which asks a judge too."""
    prices = {"judge_prices": [10, 30]}
    given = judged.words(judge="fake-1", judge_url=judge.url, **prices)
    with mock.patch.dict(os.environ, {"OPENAI_API_KEY": KEY}):
        return tiny.fintune(verb, *given, *words)


def results(judged: tiny.Chain) -> dict[str, Any]:
    """What the evaluation says of its judge."""
    return dict(frozen.read_json(judged.judging / "test_results.json")["judge"])


def raw(judged: tiny.Chain) -> list[dict[str, Any]]:
    """A line a call."""
    return tiny.read_lines(judged.judging / "eval_50_gpt_judged_raw.jsonl")


def test_every_call_is_made_once_and_a_second_run_makes_none(judged: tiny.Chain) -> None:
    with fake_judge.serve(fake_judge.FakeJudge()) as judge:
        said = ask(judge, judged)
        assert said.code == 0, said.err
        assert len(judge.paid) == CALLS
        assert set(judge.paid.values()) == {1}
        again = ask(judge, judged)
        assert again.code == 0, again.err
        assert sum(judge.asked.values()) == CALLS
    found = results(judged)
    assert (found["calls"], found["unscored"]["value"]) == (CALLS, 0.0)
    assert found["control_items"] == {"ok": 6, "of": 6, "failed": []}
    assert found["usd"] == pytest.approx(CALLS * (1000 * 10 + 100 * 30) / 1e6)
    assert found["win_rate"]["won"] + found["win_rate"]["tied"] + found["win_rate"]["lost"] == 3
    assert (judged.judging / "done.json").is_file()
    rows = raw(judged)
    assert len(rows) == CALLS
    assert {row["served_model"] for row in rows} == {"fake-2026-01-01"}
    asked = [json.loads(body) for body in judge.bodies]
    assert {body["model"] for body in asked} == {"fake-1"}
    assert {body["temperature"] for body in asked} == {0}
    assert {body["response_format"]["type"] for body in asked} == {"json_schema"}


def test_no_file_holds_the_key(judged: tiny.Chain) -> None:
    judge = fake_judge.FakeJudge()
    judge.secret = KEY
    with fake_judge.serve(judge):
        assert ask(judge, judged).code == 0
    files = [path for path in judged.eval.rglob("*") if path.is_file()]
    assert not [path.name for path in files if KEY.encode() in path.read_bytes()]
    assert "[redacted]" in (judged.judging / "judge_calls.jsonl").read_text()


@pytest.mark.parametrize("fault", ["429 after seconds", "reset in the reply", "5 MB"])
def test_a_fault_that_passes_costs_no_verdict(judged: tiny.Chain, fault: str) -> None:
    with fake_judge.serve(fake_judge.FakeJudge(fault)) as judge:
        said = ask(judge, judged)
    assert said.code == 0, said.err
    assert results(judged)["unscored"]["value"] == 0.0
    assert set(judge.paid.values()) == {1}


def test_a_body_that_is_no_completion_is_asked_again_by_the_same_command(
    judged: tiny.Chain,
) -> None:
    with fake_judge.serve(fake_judge.FakeJudge("cut json")) as judge:
        codes = [ask(judge, judged).code]
        while codes[-1] and len(codes) < CALLS:
            assert (judged.eval / "done.json").is_file()
            codes.append(ask(judge, judged).code)
    assert codes[0] == 1
    assert codes[-1] == 0
    # A window of spoilt replies ends the first; the second makes that window's calls and spoils
    # the first reply of all others, whose calls the third makes.
    assert len(codes) <= 3
    assert results(judged)["unscored"]["value"] == 0.0
    assert set(judge.paid.values()) == {1}


def test_replies_that_are_never_verdicts_are_counted_and_decide_nothing(
    judged: tiny.Chain,
) -> None:
    never = fake_judge.FakeJudge(verdict=lambda prompt: {"winner": "both"})
    with fake_judge.serve(never) as judge:
        said = ask(judge, judged)
    assert said.code == 0, said.err
    assert results(judged)["unscored"]["value"] == 1.0
    assert {row["unscored_reason"] for row in raw(judged)} == {"parse_failure"}
    found = frozen.read_json(judged.judging / "test_results.json")
    assert found["verdict"] == "invalid"
    assert any("unscored" in reason for reason in found["invalid_reasons"])


@pytest.mark.parametrize("status", ["401", "402", "404"])
def test_a_refusal_ends_with_1_after_eight_requests_and_asking_goes_on(
    judged: tiny.Chain, status: str
) -> None:
    with fake_judge.serve(fake_judge.FakeJudge(status)) as judge:
        said = ask(judge, judged)
        assert (said.code, f"(HTTP {status})" in said.err) == (1, True), said.err
        assert ("OPENAI_API_KEY" in said.err) == (status == "401")
        assert KEY not in said.err
        assert sum(judge.asked.values()) <= 8
        judge.fault = ""
        assert ask(judge, judged, verb="eval").code == 0
    assert len(judge.paid) == CALLS


def test_a_key_that_is_not_set_ends_with_1_before_any_request(judged: tiny.Chain) -> None:
    with mock.patch.dict(os.environ):
        os.environ.pop("MY_JUDGE_KEY", None)
        asked = {"judge_url": "https://judge.invalid/v1", "judge_key": "MY_JUDGE_KEY"}
        words = judged.words(judge="fake-1", **asked)
        said = tiny.fintune("judge", *words, "--judge-host", "judge.invalid")
        other = tiny.fintune("judge", *words)
    assert (said.code, "MY_JUDGE_KEY is not set" in said.err) == (1, True), said.err
    refused = "the key in MY_JUDGE_KEY is not for judge.invalid"
    assert (other.code, refused in other.err, "--judge-host" in other.err) == (1, True, True)


def test_a_budget_that_is_spent_ends_with_3_and_more_goes_on(judged: tiny.Chain) -> None:
    with fake_judge.serve(fake_judge.FakeJudge()) as judge:
        said = ask(judge, judged, "-s", "eval.judge.max_usd=0.2")
        assert said.code == 3, said.err
        assert "the next call may pass the limit of $0.2" in said.err
        assert 0 < len(judge.paid) < CALLS
        assert ask(judge, judged, verb="eval").code == 0
    assert len(judge.paid) == CALLS
    assert set(judge.paid.values()) == {1}


def test_a_judge_that_was_killed_asks_again_only_what_was_under_way(
    judged: tiny.Chain, tmp_path: Path
) -> None:
    given = {"judge": "fake-1"}
    with fake_judge.serve(fake_judge.FakeJudge(delay=0.2)) as judge:
        words = judged.words(judge_url=judge.url, **given)
        process = tiny.Forked("judge", *words, log=tmp_path / "log")

        def logged() -> bytes:
            return b"".join(
                p.read_bytes() for p in judged.eval.glob("judgings/*/judge_calls.jsonl")
            )

        tiny.until(lambda: b'"done"' in logged(), process)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        judge.delay = 0
        lines = [json.loads(line) for line in logged().split(b"\n")[:-1]]
        finished = {line["key"] for line in lines if line["row"] == "done"}
        assert tiny.fintune("eval", *words).code == 0
    assert finished
    assert len(judge.paid) == CALLS
    assert {judge.paid[key] for key in finished} == {1}


def test_without_a_judge_there_is_nothing_to_ask(judged: tiny.Chain) -> None:
    said = tiny.fintune("judge", *judged.words())
    assert (said.code, "no judge is configured" in said.err) == (1, True)
