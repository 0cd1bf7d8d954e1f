# ruff: noqa: T201
"""What the cases of ../shared/cases call, in this version's names: the verbs of their product.py.

    prepare SOURCE [--trained]     rows kept, the first of them, the ledger's reasons
    train ROWS key=value ... [then key=value ...]
    run ROWS key=value ...
    task NAME FILE [ANSWER]        the items read; how the reference (or ANSWER) is graded
    grade                          of lines [kind, reference, answer, choices, question] on
                                   standard input
    hub-configurations             what a data set with several configurations is answered
    judge RUN MODEL URL            the judge over a copy of a finished run
    release RUN

Commands run in this process, through the installed entry point, unless FINTUNE names the program
of another installation. BASE is how a small base is named; without it a tiny one is made.
"""

import atexit
import collections
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
import tiny

FINTUNE = os.environ.get("FINTUNE", tiny.program())
BASE = shlex.split(os.environ.get("BASE", f"-c {shlex.quote(str(tiny.config()))}"))
KEYS = {
    name: tiny.KEYS[name]
    for name in (
        *("schedule", "optimizer", "max_steps", "epochs", "target_modules", "report_to"),
        *("max_train_rows", "tasks"),
    )
}
SMALL = [
    f"{tiny.KEYS[name]}={value}"
    for name, value in {
        "batch_size": 4,
        "accumulation": 1,
        "eval_rows": 8,
        "eval_steps": 1,
        "max_new_tokens": 8,
    }.items()
]


def called(*words: str) -> tuple[int, str]:
    """Exit code and output of a command, what went to standard error last."""
    if Path(FINTUNE).absolute().parent == Path(sys.executable).absolute().parent:
        said = tiny.fintune(*words)
        return said.code, said.out + said.err
    command = [FINTUNE, *words]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ended.returncode, ended.stdout


def settings(**values: Any) -> list[str]:
    """`KEY=VALUE` of settings by their names in the tests."""
    return tiny.words(**values)[1::2]


def fintune(verb: str, source: str, *settings: str, also: tuple[str, ...] = ()) -> tuple[int, str]:
    """Runs one verb into ./out; returns the exit code and the last lines of what was said."""
    command = [verb, *BASE, *tiny.words(out="out", source=source, min_tokens=5)]
    for setting in settings:
        command += ["-s", setting]
    code, text = called(*command, *also)
    return code, "\n".join(text.splitlines()[-5:])


def named(pairs: tuple[str, ...]) -> list[str]:
    return [f"{KEYS[key]}={value}" for key, _, value in (pair.partition("=") for pair in pairs)]


def prepared_rows(*parts: str) -> list[dict[str, Any]]:
    import pyarrow.parquet

    files = [Path(f"out/data/{part}.parquet") for part in parts]
    return [
        row
        for file in files
        if file.exists()
        for row in pyarrow.parquet.read_table(file).to_pylist()
    ]


def prepare(source: str, trained: str = "") -> None:
    shutil.rmtree("out", ignore_errors=True)
    print(*fintune("prepare", source))
    if not Path("out/data/train.parquet").exists():
        return
    rows = sorted(
        prepared_rows("train", "validation", "test"), key=lambda row: (row["source"], row["line"])
    )
    print(len(rows), "rows kept, of", sorted({row["source"] for row in rows}))
    for message in rows[0]["messages"] if rows else []:
        print("  ", message["role"], "|", message["content"][-90:])
    print(collections.Counter((row["reason"], row["detail"]) for row in prepared_rows("ledger")))
    if trained:
        labels = [label for label in prepared_rows("train")[0]["labels"] if label != -100]
        print("trained:", repr(decoded(labels))[:120])


def decoded(ids: list[int]) -> str:
    """The text of token ids of the base that BASE names: its config's, if it says a folder."""
    import transformers
    import yaml

    tree = yaml.safe_load(Path(BASE[1]).read_text()) if Path(BASE[1]).is_file() else {}
    section, key = tiny.KEYS["base_path"].split(".")
    folder = tree.get(section, {}).get(key)
    assert folder, f"{BASE[1]} names no folder of a base: its tokens cannot be read"
    return str(transformers.AutoTokenizer.from_pretrained(folder).decode(ids))


def train(rows: str, *pairs: str) -> None:
    shutil.rmtree("out", ignore_errors=True)
    first, again = pairs, None
    if "then" in pairs:
        first, again = pairs[: pairs.index("then")], pairs[pairs.index("then") + 1 :]
    data = tiny.KEYS["source"].partition(".")[0] + "."
    fintune("prepare", rows, *SMALL, *[s for s in named(first) if s.startswith(data)])
    code, said = fintune("train", rows, *SMALL, *named(first))
    if again is not None:
        drift = ("--force-resume", "more steps")
        code, said = fintune("train", rows, *SMALL, *named(again), also=drift)
    print(said, f"exit code {code}", sep="\n")
    metrics = Path("out/run/metrics.jsonl")
    if metrics.exists():
        print(metrics.read_text().count('"loss"'), "steps in metrics.jsonl")


def run(rows: str, *pairs: str) -> None:
    shutil.rmtree("out", ignore_errors=True)
    code, said = fintune("run", rows, *SMALL, *settings(max_steps=2), *named(pairs))
    made = sorted(os.listdir("out") if Path("out").exists() else [])
    print(said, f"exit code {code}", "made: " + " ".join(made), sep="\n")


@cache
def finished() -> Path:
    """A finished run of two updates on the tiny base, for verbs that need one."""
    root = Path(tempfile.mkdtemp(prefix="cases-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    short = {"max_train_rows": 24, "max_held_out_rows": 12, "max_steps": 2, "batch_size": 2}
    for verb in ("prepare", "train"):
        code, text = called(verb, *BASE, *tiny.words(out=root, source=tiny.rows(), **short))
        assert code == 0, text
    return root


def regraded(folder: Path, item: dict[str, Any], answer: str) -> tuple[str, str]:
    """Outcome of an answer to an item of predictions.jsonl, and what was read in it.

    `fintune eval --rescore` grades what stands in the files of an evaluation; this writes the
    fewest that it takes.
    """
    folder.mkdir(exist_ok=True)
    facts = {"primary": "accuracy", "seed": 0, "judged": [], "contaminated": [], "provenance": {}}
    facts |= {"max_task_drop": 0.05, "looks": 1}
    (folder / "run.json").write_text(json.dumps({"format": 1, **facts}))
    loss = {"source": "x", "length": "<= 128", "rows": 1, "tokens": 1, "base": 1.0, "adapter": 1.0}
    (folder / "heldout.jsonl").write_text(json.dumps(loss) + "\n")
    (folder / "eval_50_gpt_judged_raw.jsonl").write_text("")
    said = {"text": answer, "tokens": 1, "finish": "stop", "prompt_sha256": "0", "item": item}
    lines = [json.dumps({"model": who, **said}) + "\n" for who in ("base", "adapter")]
    (folder / "predictions.jsonl").write_text("".join(lines))
    (folder / "done.json").unlink(missing_ok=True)
    facts = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
    }
    sealed = {"inputs": {}, "inputs_sha256": hashlib.sha256(b"{}").hexdigest(), "files": facts}
    (folder / "done.json").write_text(json.dumps({"format": 1, **sealed}))
    found = tiny.answer_json("eval", "--rescore", folder)
    counts = found["tasks"].get(item["task"], {}).get("adapter", {})
    outcomes = ("correct", "wrong", "abstained", "unparsed")
    outcome = next((name for name in outcomes if counts.get(name) == 1), "not counted")
    read = re.search(r"<small>read: ([^;<]*)", (folder / "report.html").read_text())
    return outcome, read[1] if read else "nothing"


def graded(
    kind: str,
    reference: str,
    answer: str,
    choices: tuple[str, ...] = (),
    question: str = "What was it?",
) -> tuple[str, str]:
    messages = [{"role": "user", "content": question}]
    item = {"id": "x", "task": "x", "kind": kind, "group": "g", "messages": messages}
    item |= {"reference": reference, "choices": list(choices), "majority": None}
    with tempfile.TemporaryDirectory() as folder:
        return regraded(Path(folder) / "eval", item, answer)


def task(name: str, file: str, answer: str | None = None) -> None:
    out = finished()
    shutil.rmtree("out", ignore_errors=True)
    here = {"out": out, "eval_out": Path.cwd() / "out", "tasks": {name: file}}
    code, said = called("eval", *BASE, *tiny.words(source=tiny.rows(), **here))
    if code:
        print("refused:" if "Traceback" not in said else "broke off:", said)
        return
    lines = tiny.read_lines(Path("out/predictions.jsonl"))
    items = [line["item"] for line in lines if line["item"]["task"] == name]
    items = list({item["id"]: item for item in items}.values())
    first = items[0] if items else {"kind": "", "choices": ""}
    print(len(items), "items", first["kind"], first["choices"][:6])
    if items:
        given = first["reference"] if answer is None else answer
        outcome, _ = regraded(Path("out/one"), first, given)
        print("reference", repr(first["reference"]), "| answer", repr(given), "grades as", outcome)


def grade() -> None:
    for line in sys.stdin.read().splitlines():
        case = json.loads(line)
        outcome, read = graded(*case)
        print(*case[:2], "|", repr(case[2]), "->", outcome, "read", repr(read))


def hub_configurations() -> None:
    """Two configurations, none the default, asked for without naming one."""
    from hub.server import Hub
    from huggingface_hub import constants

    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("finqa", "fpb")
    )
    files = {"README.md": f"---\nconfigs:\n{configs}---\n".encode()}
    files |= {f"{name}/rows.jsonl": tiny.rows().read_bytes() for name in ("finqa", "fpb")}
    shutil.rmtree("out", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder, Hub(Path(folder) / "hub") as hub:
        hub.commit("dataset", "someone/finance-bench", files)
        url = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        known = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": f"{folder}/cache"}
        with mock.patch.multiple(constants, HUGGINGFACE_CO_URL_TEMPLATE=url, **known):
            said = fintune("prepare", "", *settings(sources=[{"path": "someone/finance-bench"}]))
    print(*said)


def of_run(verb: str, run: str, *settings: str) -> None:
    command = [verb, *BASE, *tiny.words(out=run)]
    for setting in settings:
        command += ["-s", setting]
    if verb == "release":  # as the finished run was released
        command += ["-s", "release.samples=text", "--accept", tiny.REASON]
    code, text = called(*command)
    print("\n".join(text.splitlines()[-4:]), f"exit code {code}", sep="\n")


def judge(run: str, model: str, url: str) -> None:
    of_run("judge", run, *settings(judge=model, judge_url=url))


def release(run: str) -> None:
    of_run("release", run)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    globals()[verb.replace("-", "_")](*arguments)
