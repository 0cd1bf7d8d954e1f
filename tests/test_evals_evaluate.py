"""The whole evaluation on a tiny base: kept, continued, refused, rescored, and its verdict."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_judge import FakeJudge, serve
from fintune.evals.report import rescore
from test_cli import run
from tiny_eval import eval_config

from fintune import files, seal
from fintune.config import dump_yaml
from fintune.errors import ConfigError, DataError, GateRefused, OutputError
from fintune.evals import evaluate as module
from fintune.evals import regression, results
from fintune.evals.evaluate import evaluate, judge_answers

KEYS = ("verdict", "primary", "guards", "loss", "accuracy", "tasks", "misses", "measures", "judge")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tasks = {"unanswerable": "", "advice_safety": ""}
    config = eval_config(tmp_path_factory.mktemp("eval") / "run", tasks=tasks)
    return config, evaluate(config)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_it_writes(finished):
    config, found = finished
    on_disk = files.read_json(config.eval_dir / "test_results.json")
    assert on_disk == json.loads(json.dumps(found)) and set(KEYS) <= set(found)
    assert {"base", "adapter"} <= found["loss"].keys() and found["loss"]["base"] > 0
    assert set(found["accuracy"]["difference"]) >= {"value", "ci95", "n", "mde80"}
    seal.read_seal(config.eval_dir, stage="evaluation", make="x")
    rows = list(files.read_jsonl(config.eval_dir / "predictions.jsonl"))
    ids = [row["item"]["id"] for row in rows]
    assert ids[::2] == ids[1::2] and {row["model"] for row in rows} == {"base", "adapter"}
    assert found["n"]["checkable"] >= 120 and found["n"]["items"] == len(ids) // 2
    assert "unsafe_advice_refused" in found["measures"]


def test_without_a_judge_the_fifty_are_unscored(finished):
    config, found = finished
    rows = list(files.read_jsonl(config.eval_dir / "eval_50_gpt_judged_raw.jsonl"))
    assert len(rows) == 50 and found["judge"] is None
    for row in rows:
        assert (row["status"], row["unscored_reason"]) == ("unscored", "no_judge")
        assert set(row["answers"]) == {"base", "adapter"}
        assert row["deterministic"]["base"]["outcome"] in (
            "correct",
            "wrong",
            "abstained",
            "unparsed",
        )


def test_the_same_again_is_kept_and_rescoring_gives_the_same_bytes(finished, monkeypatch, capsys):
    config, found = finished
    before = contents(config.eval_dir)
    monkeypatch.setattr(module, "_answer", None)  # nothing may be computed again
    assert evaluate(config) == found
    assert "unchanged, kept" in capsys.readouterr().err
    (config.eval_dir / "report.html").write_text("lost")
    (config.eval_dir / "test_results.json").write_text("{}" + " " * 10)
    rescore(config.eval_dir)
    assert contents(config.eval_dir) == before


def test_other_inputs_are_refused_by_name_and_fresh_moves_aside(finished, tmp_path):
    config, _ = finished
    other = config.model_copy(update={"seed": 7})
    with pytest.raises(OutputError, match="seed: 42 -> 7"):
        evaluate(other)
    assert (config.eval_dir / "done.json").is_file()


def test_a_killed_evaluation_continues(tmp_path, monkeypatch):
    config = eval_config(tmp_path / "run", test=110)
    whole = evaluate(config)
    kept = contents(config.eval_dir)
    evaluate_again = config.model_copy(
        update={"eval": config.eval.model_copy(update={"out": tmp_path / "cut"})}
    )
    real, made = module.generate, []

    def killed(*args, **kwargs):
        for batch in real(*args, **kwargs):
            made.append(len(batch))
            yield batch
            if len(made) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluate_again)
    cut = evaluate_again.eval_dir
    assert not (cut / "done.json").exists()
    with (cut / "predictions.jsonl").open("a") as file:
        file.write('{"model": "adap')  # torn by the kill
    found = evaluate(evaluate_again)
    assert found["accuracy"] == whole["accuracy"]
    assert (cut / "predictions.jsonl").read_bytes() == kept["predictions.jsonl"]
    done = sum(made)
    assert done == 2 * whole["n"]["items"], "nothing was answered twice"


def test_a_judge_joins_later_and_is_asked_once(finished, tmp_path):
    config, before = finished
    with serve(FakeJudge()) as server:
        judged = {"model": "fake", "base_url": server.url}
        section = config.eval.model_copy(update={"judge": type(config.eval.judge)(**judged)})
        with_judge = config.model_copy(update={"eval": section})
        with pytest.raises(ConfigError, match="no judge is configured"):
            judge_answers(config)
        found = judge_answers(with_judge)
        asked = sum(server.asked.values())
        assert found["judge"]["calls"] == asked > 100
        assert found["judge"]["control_items"]["failed"] == []
        assert found["accuracy"] == before["accuracy"], "the judge changes no arithmetic"
        kept = contents(config.eval_dir)
        evaluate(with_judge)
        assert sum(server.asked.values()) == asked and contents(config.eval_dir) == kept
    rescore(config.eval_dir)
    assert contents(config.eval_dir) == kept
    assert "looked" in kept["report.html"].decode(), "the report shows what the judge said"


@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_whatever_the_judge_does_the_evaluation_stays_finished(finished, limit):
    config, _ = finished
    with serve(FakeJudge()) as server:
        prices = {"usd_per_million": (2, 8), "max_usd": limit}
        judged = type(config.eval.judge)(model=f"m{limit}", base_url=server.url, **prices)
        tight = config.model_copy(update={"eval": config.eval.model_copy(update={"judge": judged})})
        before = {
            name: data for name, data in contents(config.eval_dir).items() if "calls" not in name
        }
        for verb in (judge_answers, evaluate):
            with pytest.raises(GateRefused, match="may pass"):
                verb(tight)
            now = contents(config.eval_dir)
            assert before.items() <= now.items(), "results, report and seal as they were"
        assert set(server.asked.values()) <= {1}, "no call is made twice"
        free = judged.model_copy(update={"max_usd": None})
        found = judge_answers(
            config.model_copy(update={"eval": config.eval.model_copy(update={"judge": free})})
        )
        assert found["judge"]["calls"] == sum(server.asked.values()) == len(server.asked)


def test_a_shared_config_gets_no_key_and_harms_no_evaluation(
    finished, tmp_path, monkeypatch, capsys
):
    config, _ = finished
    monkeypatch.setenv("HF_TOKEN", "hf_sesame1sesame1sesame1")
    path = tmp_path / "shared.yaml"
    path.write_text(dump_yaml(config))
    with serve(FakeJudge()) as server:
        judged = {"model": "fake", "base_url": server.url, "key_variable": "HF_TOKEN"}
        sets = [f"eval.judge.{key}={value}" for key, value in judged.items()]
        sets.append(f"eval.out={tmp_path / 'eval'}")
        given = ["-c", str(path), *(word for override in sets for word in ("-s", override))]
        shutil.copytree(config.eval_dir, tmp_path / "eval")
        before = contents(tmp_path / "eval")
        for verb in ("judge", "eval"):
            code, _, said = run(capsys, verb, *given)
            assert (code, "--judge-host 127.0.0.1" in said, "sesame1" in said) == (1, True, False)
        assert not server.asked and contents(tmp_path / "eval") == before
        code, _, said = run(capsys, "judge", *given, "--judge-host", "127.0.0.1")
        assert code == 0, said
        assert server.keys == {"Bearer hf_sesame1sesame1sesame1"}


def test_unfinished_runs_and_missing_rows_are_said(tmp_path):
    config = eval_config(tmp_path / "run", train=40, test=10)
    (config.run_dir / "done.json").unlink()
    with pytest.raises(OutputError, match="training run"):
        evaluate(config)
    seal.seal(config.run_dir, {})
    path = config.data_dir / "test.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    seal.seal(config.data_dir, {})
    with pytest.raises(DataError, match="test.parquet has no row"):
        evaluate(config)


def test_rows_that_training_saw_make_it_invalid(tmp_path):
    config = eval_config(tmp_path / "run", train=60, test=110)
    path = config.data_dir / "train.parquet"
    leaked = pq.read_table(config.data_dir / "test.parquet").slice(0, 3)
    pq.write_table(pa.concat_tables([pq.read_table(path), leaked]), path)
    seal.seal(config.data_dir, {})
    found = evaluate(config)
    assert found["verdict"] == "invalid" and "3 decision rows" in str(found["invalid_reasons"])


def verdict(*, low=0.1, high=0.2, n=200, checked=200, judged=None, primary="accuracy", **run):
    difference = {"value": (low + high) / 2, "ci95": [low, high], "n": n, "mde80": 0.1}
    run = {"primary": primary, "contaminated": [], "loss": (2.0, 1.0), **run}
    base, adapter = run.pop("loss")
    general = run.pop("regression", None)
    return results._verdict(
        run, [None] * checked, {"base": base, "adapter": adapter},
        {"difference": difference}, judged, general,
    )  # fmt: skip


def judge_says(low, high, n=60, unscored=0.0, failed=()):
    difference = {"value": 0, "ci95": [low, high], "n": n, "mde80": 0.1}
    return {
        "win_rate": {"difference": difference},
        "control_items": {"failed": list(failed)},
        "unscored": {"value": unscored},
    }


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ({}, "better"),
        ({"low": -0.01}, "no_detectable_difference"),
        ({"low": 0.0}, "no_detectable_difference"),
        ({"low": -0.2, "high": -0.1}, "worse"),
        ({"loss": (1.0, 1.1)}, "no_detectable_difference"),
        ({"regression": {"pass": False}}, "no_detectable_difference"),
        ({"regression": {"pass": True}}, "better"),
        ({"contaminated": ["x"]}, "invalid"),
        ({"n": 49}, "invalid"),
        ({"checked": 99}, "invalid"),
        ({"checked": 99, "judged": judge_says(0.1, 0.2)}, "better"),
        ({"checked": 99, "judged": judge_says(-0.2, -0.1)}, "worse"),
        ({"checked": 99, "judged": judge_says(0.1, 0.2, n=40)}, "invalid"),
        ({"judged": judge_says(-0.2, -0.1)}, "better"),
        ({"judged": judge_says(0, 0, unscored=0.03)}, "invalid"),
        ({"judged": judge_says(0, 0, failed=["sign"])}, "invalid"),
        ({"primary": "win_rate"}, "invalid"),
        ({"primary": "win_rate", "judged": judge_says(-0.1, 0.1)}, "no_detectable_difference"),
    ],
)
def test_verdict_rules(case, wanted):
    assert verdict(**case)["verdict"] == wanted


def test_general_ability_is_non_inferiority():
    base = {"a": {str(at): float(at % 2) for at in range(200)}}
    same = {"a": dict(base["a"])}
    kept = regression.summary(base, same, seed=1)
    assert kept["pass"] and kept["tasks"]["a"]["difference"]["value"] == 0
    worse = {"a": {key: (0.0 if int(key) < 30 else score) for key, score in base["a"].items()}}
    lost = regression.summary(base, worse, seed=1)
    assert not lost["pass"] and lost["tasks"]["a"]["difference"]["value"] == -0.075


def test_lm_eval_missing_or_a_task_it_does_not_know_is_said(finished):
    config, _ = finished
    section = config.eval.model_copy(update={"regression": ("no_such_task",)})
    with pytest.raises(ConfigError, match="lm-eval"):
        regression.scores(None, None, section)
