"""The cases of ../shared/cases, each by its own cmd.sh, unchanged but for its ports.

`$FINTUNE` and `$PYTHON` are small programs that hand a command to this process, where it runs
through the entry point: starting Python with torch for each would take ten minutes. MUST is a
sentence, so what it asks for is written out below as a check, a function of the case's name.
A check never takes a refusal for right without the words that make it the right one, and a
traceback or an unknown key is never right.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import cases_product
import pyarrow.parquet as pq
import pytest
import tiny
from safetensors import safe_open

CASES = tiny.SHARED / "cases"
NAMES = sorted(path.parent.name for path in CASES.glob("*/MUST"))
NOT_YET = {}
"""Cases that fail today, by the part that is to be mended. One that passes must be taken out."""
SLOW = ("c13",)
"""Needs an adapter of its own: ten seconds."""
STALE = re.compile(r"unknown key|no such option|No such option|No such command")

CLIENT = """
import json, os, socket, sys
name, python, product, address, *words = sys.argv[1:]
if name == "python" and words[:1] != [product]:
    os.execv(python, [python, *words])
text = "" if sys.stdin.isatty() else sys.stdin.read()
asked = dict(name=name, words=words, cwd=os.getcwd(), env=dict(os.environ), text=text)
with socket.socket(socket.AF_UNIX) as server:
    server.connect(address)
    server.sendall(json.dumps(asked).encode())
    server.shutdown(socket.SHUT_WR)
    said = json.loads(b"".join(iter(lambda: server.recv(1 << 16), b"")))
sys.stdout.write(said["out"])
sys.stderr.write(said["err"])
sys.exit(said["code"])
"""


@dataclass
class Outcome:
    """What a case came to.

    Attributes:
        text: what cmd.sh wrote, both streams.
        calls: how each command of the product ended.
        folder: the case's folder, with what was made in it.
    """

    folder: Path
    server: tiny.Server
    text: str = ""
    calls: list[tiny.Said] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Exit code of the last command."""
        return self.calls[-1].code

    @property
    def said(self) -> str:
        """What the last command wrote, both streams, on one line."""
        return " ".join((self.calls[-1].out + self.calls[-1].err).split())

    @cached_property
    def reply(self) -> tuple[int, Any]:
        """Status and body of curl's reply."""
        body, status = re.fullmatch(r"(.*) \[(\d+)\]\n", self.text, re.DOTALL).groups()  # type: ignore[union-attr]
        return int(status), body if body.startswith("data:") else json.loads(body)

    @property
    def refused(self) -> str:
        """The message of a 400, or nothing."""
        return str(self.reply[1]["error"]["message"]) if self.reply[0] == 400 else ""

    @property
    def body(self) -> dict[str, Any]:
        """What the case asked the server."""
        return dict(json.loads((self.folder / "body.json").read_text()))

    def asked(self, path: str, **changes: Any) -> Any:
        """The reply to the case's body with other fields; None takes one out."""
        body = {**self.body, **changes}
        return self.server.get(path, {k: v for k, v in body.items() if v is not None})

    def rows(self, *parts: str) -> list[dict[str, Any]]:
        """Prepared rows by source and line."""
        with contextlib.chdir(self.folder):
            found = cases_product.prepared_rows(*(parts or ("train", "validation", "test")))
        return sorted(found, key=lambda row: (row["source"], row["line"]))

    def texts(self, role: str) -> list[str]:
        """The last text of a role in each prepared row."""
        return [[m["content"] for m in r["messages"] if m["role"] == role][-1] for r in self.rows()]

    def dropped(self) -> list[dict[str, Any]]:
        """The ledger."""
        with contextlib.chdir(self.folder):
            return cases_product.prepared_rows("ledger")

    def trained(self) -> str:
        """The text of all trained labels."""
        labels = [n for row in self.rows("train") for n in row["labels"] if n != -100]
        with contextlib.chdir(self.folder):
            return cases_product.decoded(labels) if labels else ""

    def file(self, name: str) -> str:
        """A file of the case's folder, or nothing."""
        path = self.folder / name
        return path.read_text(errors="replace") if path.is_file() else ""

    def steps(self) -> int:
        """Updates in metrics.jsonl."""
        return self.file("out/run/metrics.jsonl").count('"loss"')

    def outcomes(self) -> list[str]:
        """What `grade` printed of each line."""
        return re.findall(r"-> (\w+) read", self.text)


def says(text: str, *patterns: str) -> bool:
    """Whether a text holds every pattern, whatever the case."""
    return all(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)


def all_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The raw rows of a case."""
    return tiny.read_lines(folder / name)


# ---- checks ----------------------------------------------------------------------------------


def c01(case: Outcome) -> bool:
    if case.reply[0] != 200:
        return False
    choices = case.reply[1]["choices"]
    alone = [case.asked("/v1/completions", prompt=ids)["choices"][0] for ids in case.body["prompt"]]
    return [(c["index"], c["text"]) for c in choices] == [
        (at, choice["text"]) for at, choice in enumerate(alone)
    ]


def one_completion(case: Outcome) -> bool:
    """One choice, to the prompt that the same text makes when nothing else is asked for."""
    if case.reply[0] != 200 or len(case.reply[1]["choices"]) != 1:
        return False
    prompt = case.body["prompt"]
    text = prompt[0] if isinstance(prompt, list) else prompt
    plain = case.server.get(
        "/v1/completions", {"model": "adapter", "prompt": text, "max_tokens": 1}
    )
    tokens = "prompt_tokens"
    return bool(
        isinstance(case.reply[1]["choices"][0]["text"], str)
        and case.reply[1]["usage"][tokens] == plain["usage"][tokens]
    )


def one_answer(case: Outcome) -> bool:
    """As many prompt tokens, and the same greedy answer, as the bare conversation has."""
    if case.reply[0] != 200 or len(case.reply[1]["choices"]) != 1:
        return False
    bare = [{name: m[name] for name in ("role", "content")} for m in case.body["messages"]]
    limit = case.body["max_tokens"]
    plain = case.server.get(
        "/v1/chat/completions", {"model": "adapter", "messages": bare, "max_tokens": limit}
    )
    both = (case.reply[1], plain)
    usage, content = ([reply[k] for reply in both] for k in ("usage", "choices"))
    return bool(usage[0] == usage[1] and content[0][0]["message"] == content[1][0]["message"])


def c08(case: Outcome) -> bool:
    return says(case.refused, "model", "missing|required|needed")


def c10(case: Outcome) -> bool:
    if case.reply[0] == 200:
        two = case.body["messages"]
        counts = [
            case.asked("/v1/chat/completions", messages=m)["usage"]["prompt_tokens"]
            for m in ([two[0], two[2]], [two[1], two[2]])
        ]
        return bool(case.reply[1]["usage"]["prompt_tokens"] > max(counts))
    return says(case.refused, r"\b(one|single|second|two)\b", "system message")


def c11(case: Outcome) -> bool:
    if case.reply[0] == 200:
        with contextlib.suppress(ValueError):
            made = json.loads(case.reply[1]["choices"][0]["message"]["content"])
            return list(made) == ["a"] and isinstance(made["a"], str)
    return says(case.refused, "structured output|JSON schema")


def c13(case: Outcome) -> bool:
    return (
        case.code == 3
        and says(case.said, "server", "undecided")
        and not says(case.said, "is refused|build it again")
    )


def c15(case: Outcome) -> bool:
    words = "Unsupported parameter: 'max_tokens' is not supported"
    return case.code == 1 and says(case.said, words) and len(case.said) < 1500


def c18(case: Outcome) -> bool:
    *judged, released = case.calls
    return (
        [call.code for call in judged] == [1, 1]
        and all(says(call.err, "401|key") for call in judged)
        and case.text.count("copy/eval/done.json\n") == 2
        and "cannot access" not in case.text
        and released.code == 0
    )


def d01(case: Outcome) -> bool:
    raw = all_of(case.folder, "rows.jsonl")
    expected = [["".join(p["text"] for p in m["content"]) for m in row["messages"]] for row in raw]
    return [[m["content"] for m in row["messages"]] for row in case.rows()] == expected


def d03(case: Outcome) -> bool:
    kept = case.texts("assistant")
    if kept:
        return all(says(text, "get_revenue") for text in kept)
    return says(case.said, "24 [a-z_ ]*tool_?call")


def d05(case: Outcome) -> bool:
    kept = case.texts("assistant")
    if kept and all(says(text, "<think>.*The later figure less the earlier one") for text in kept):
        return True
    told = case.file("out/data/manifest.json") + case.file("out/data/report.html") + case.said
    return says(told, "reasoning")


def masked(case: Outcome) -> bool:
    if case.rows("train"):
        return "WRONG DRAFT" not in case.trained() and "Revenue of" in case.trained()
    return case.code == 1 and says(case.said, "24 [a-z_ ]*(weight|mask)")


def d09(case: Outcome) -> bool:
    return case.code == 1 and says(case.said, "answer", "twice|more than once") and not case.rows()


def d11(case: Outcome) -> bool:
    raw = pq.read_table(case.folder / "rows.parquet")["answer"].to_pylist()
    return "12.50" in case.texts("assistant") and case.texts("assistant") == [str(n) for n in raw]


def d12(case: Outcome) -> bool:
    return len(case.rows()) == 24 and set(case.texts("assistant")) == {"0.1"}


def d14(case: Outcome) -> bool:
    raw = all_of(case.folder, "rows.jsonl")
    if case.rows():
        turns = [[m["content"] for m in row["messages"]] for row in case.rows()]
        kept = [[*row["history"][0], row["instruction"], row["output"]] for row in raw]
        return turns == kept
    return case.code == 1 and says(case.said, "24 [a-z_ ]*history")


def splits(case: Outcome) -> bool:
    if any("test" in Path(row["source"]).name for row in case.rows("train")):
        return says(case.said, r"test[-\w]*\.(jsonl|parquet)")
    return len(case.rows()) >= 18


def d18(case: Outcome) -> bool:
    sources = {row["source"] for row in case.rows()}
    left = {"B.JSONL", "c.ndjson"}
    return left < sources or (case.code == 0 and all(name in case.said for name in left))


def d20(case: Outcome) -> bool:
    if case.rows():
        return [len(row["messages"]) for row in case.rows()] == [2] * 24
    return case.code == 1 and says(case.said, "messages", "JSON")


def d22(case: Outcome) -> bool:
    names = ("id", "query", "answer", "text", "choices", "gold")
    named = all(re.search(rf"\b{name}\b", case.said) for name in names)
    return case.code == 1 and named and says(case.said, r"columns") and "no_user" not in case.said


def d24(case: Outcome) -> bool:
    why = "Extra data|comma|after the object|behind the object"
    return case.code == 1 and says(case.said, "Marlow Software", why)


def d25(case: Outcome) -> bool:
    if case.rows():
        return all(len(row["messages"]) >= 2 for row in case.rows())
    return case.code == 1 and says(case.said, "save_to_disk") and "citation" not in case.said


def d26(case: Outcome) -> bool:
    first = [(row["messages"][0]["role"], row["messages"][0]["content"]) for row in case.rows()]
    return first == [("system", "You are an analyst.")] * 24


def d27(case: Outcome) -> bool:
    if case.rows():
        kept = {"#N/A", "#REF!"} & set(case.texts("assistant"))
        return not kept and {row["reason"] for row in case.dropped()} == {"boilerplate"}
    return case.code == 1 and says(case.said, "24 boilerplate")


def d29(case: Outcome) -> bool:
    texts = case.texts("user") + case.texts("assistant")
    return len(texts) == 48 and all(text.endswith("Net debt was EUR 2019m.") for text in texts)


def d31(case: Outcome) -> bool:
    if [len(row["messages"]) for row in case.rows()] == [2] * 24:
        return "I have blocked" not in case.trained()
    told = case.file("out/data/report.html") + case.said
    return says(told, r"\b24\b[^<]{0,160}inline_turns|inline_turns[^<]{0,160}\b24\b")


def d32(case: Outcome) -> bool:
    return len(case.dropped()) == 20 and says(case.said, r"\b20\b", "not_utf8", "UTF-8")


def d33(case: Outcome) -> bool:
    key = r"data\.(sources\.)?\w*(config|subset|name)\w*"
    named = says(case.said, "finqa", "fpb", key)
    return case.code == 1 and named and "check data.split" not in case.said


def items(count: int, *kinds: str) -> Callable[[Outcome], bool]:
    def check(case: Outcome) -> bool:
        """So many items of these kinds, whose own reference is right."""
        read = re.match(r"(\d+) items (\w+)", case.text)
        return bool(read and (int(read[1]), read[2]) in [(count, kind) for kind in kinds]) and (
            "grades as correct" in case.text
        )

    return check


def refused(*patterns: str) -> Callable[[Outcome], bool]:
    def check(case: Outcome) -> bool:
        """Refused by one message that says these words."""
        return case.text.startswith("refused:") and case.code == 1 and says(case.said, *patterns)

    return check


def either(*checks: Callable[[Outcome], bool]) -> Callable[[Outcome], bool]:
    return lambda case: any(check(case) for check in checks)


def labels(*wanted: str) -> Callable[[Outcome], bool]:
    def check(case: Outcome) -> bool:
        """These choices, and the reference right among them."""
        return str(list(wanted)) in case.text and "grades as correct" in case.text

    return check


def e09(case: Outcome) -> bool:
    return "reference '10' " in case.text and items(3, "number")(case)


def grades(*outcomes: str) -> Callable[[Outcome], bool]:
    """The outcome of each line; several that would do stand with a bar between them."""

    def check(case: Outcome) -> bool:
        found = case.outcomes()
        return len(found) == len(outcomes) and all(
            one in wanted.split("|") for one, wanted in zip(found, outcomes, strict=True)
        )

    return check


NOT_RIGHT = "wrong|abstained|unparsed"


def e35(case: Outcome) -> bool:
    made = case.text.rpartition("made:")[2].split()
    return case.code == 1 and says(case.said, "finqq", "finqa") and not {"data", "run"} & {*made}


def r01(case: Outcome) -> bool:
    written = (case.folder / "a.gguf").exists()
    return case.code in (1, 2) and says(case.said, "q4_0", "f16", "f32") and not written


def r02(case: Outcome) -> bool:
    merged = says(case.said, "logit difference") or (case.folder / "m").exists()
    return case.code in (1, 2) and says(case.said, "int8", "bf16", "fp32") and not merged


def r04(case: Outcome) -> bool:
    changed = " *adapter_config.json" in case.file("rel/SHA256SUMS")
    return changed and case.code == 0 and says(case.said, "verified")


def restated(case: Outcome) -> tiny.Said:
    """`export vllm` of the case's release once its hashes are redone: before, they refuse it."""
    if case.code != 3 or not says(case.said, r"changed: adapter_config\.json"):
        raise RuntimeError(f"a changed file was not noticed: {case.text}")
    tiny.rewrite_stated(case.folder / "rel")
    return tiny.fintune("export", "vllm", case.folder / "rel")


def r06(case: Outcome) -> bool:
    assert '"q_proj": 64' in case.file("rel/adapter_config.json")
    said = restated(case)
    if said.code == 0:
        return "--max-lora-rank 64 " in said.out
    return said.code == 1 and says(said.err, "rank_pattern")


def r07(case: Outcome) -> bool:
    return case.code == 3 and says(case.said, r"^error: rel is refused:.*adapter_config\.json")


def r08(case: Outcome) -> bool:
    assert '"bias": "all"' in case.file("rel/adapter_config.json")
    said = restated(case)
    return said.code == 1 and says(said.err, "vLLM", "bias")


def half_character(case: Outcome) -> bool:
    status, body = case.reply
    return status == 400 or (status == 200 and "server_error" not in str(body))


def s06(case: Outcome) -> bool:
    return says(case.refused, "text part|only text") and "Input should be" not in case.refused


def s07(case: Outcome) -> bool:
    return says(case.refused, "stop", r"\b8\b|eight") and "Input should be" not in case.refused


def typo(*words: str) -> Callable[[Outcome], bool]:
    def check(case: Outcome) -> bool:
        """Refused by a message with these words, before the base is loaded."""
        early = case.steps() == 0 and "activations" not in case.said
        return case.code == 1 and early and says(case.said, *words)

    return check


def t02(case: Outcome) -> bool:
    if case.code == 0:
        return case.steps() == 2
    return case.code == 1 and case.steps() == 0 and says(case.said, "cosine_with_min_lr", "min_lr")


def t06(case: Outcome) -> bool:
    if case.code == 0:
        return case.steps() == 2
    return case.code == 1 and case.steps() == 0 and says(case.said, "lm_head")


def t08(case: Outcome) -> bool:
    return case.code == 1 and case.steps() == 0 and says(case.said, "k_projj", "v_projj")


def t09(case: Outcome) -> bool:
    return case.steps() == 0 and (case.code == 0 or says(case.said, "max_steps"))


def t10(case: Outcome) -> bool:
    if case.code == 0:
        with safe_open(case.folder / "out/run/best/adapter_model.safetensors", "pt") as file:
            moved = [file.get_tensor(n).any() for n in file.keys() if "lora_B" in n]  # noqa: SIM118
        return case.steps() == 1 and any(moved)
    return says(case.said, "warm-?up") and "raise train.learning_rate" not in case.said


def t12(case: Outcome) -> bool:
    if case.code == 0:
        return case.steps() == 4
    return case.code == 1 and says(case.said, "finished") and "--force-resume" not in case.said


CHECKS: dict[str, Callable[[Outcome], bool]] = {
    **dict.fromkeys(("c03", "c04"), one_completion),
    **dict.fromkeys(("c06", "s04"), one_answer),
    **dict.fromkeys(("d06", "d08"), masked),
    **dict.fromkeys(("d15", "d17"), splits),
    **dict.fromkeys(("e01", "e04"), items(5, "number")),
    "e02": either(items(5, "number"), refused(r"JSON Lines|\.jsonl")),
    "e06": refused(r"line 1\b", "prompt"),
    "e07": either(labels("positive", "negative", "neutral"), refused("choices")),
    "e09": either(e09, refused("answer")),
    "e10": refused("numeric", "number", "label", "span"),
    "e12": either(labels("1", "2", "3"), refused("choices")),
    "e13": refused("no question|no item|empty|holds no"),
    "e14": grades(NOT_RIGHT, NOT_RIGHT),
    "e16": grades("wrong", "wrong"),
    "e18": grades("correct", "correct"),
    "e20": grades("correct"),
    "e21": grades(NOT_RIGHT, NOT_RIGHT),
    "e23": grades("wrong", "wrong|unparsed"),
    "e25": grades("unparsed", "unparsed"),
    "e27": grades("correct", "wrong", "correct"),
    "e29": grades("correct", "correct"),
    "e30": grades("correct", "correct"),
    "e31": grades("correct", "wrong"),
    "e33": grades("wrong", "wrong"),
    "e37": grades(NOT_RIGHT),
    **dict.fromkeys(("s01", "s02"), half_character),
    "t01": typo("cosin\\b", "cosine_with_restarts", "linear"),
    "t04": typo("adam\\b", "adamw_torch"),
}


def check_of(name: str) -> Callable[[Outcome], bool]:
    """The check of a case: of the table, or the function of its name."""
    found = CHECKS.get(name) or globals().get(name)
    assert callable(found), f"{name} has no check"
    return found


# ---- running ---------------------------------------------------------------------------------


def answered(asked: dict[str, Any]) -> dict[str, Any]:
    """Run what a client asked for, where it stands and in its environment."""
    words = asked["words"]
    with contextlib.chdir(asked["cwd"]), mock.patch.dict(os.environ, asked["env"]):
        if asked["name"] == "fintune":
            if words[0] in ("export", "verify", "serve") and words[1] != "vllm":
                words = [*words, "--base", str(tiny.base())]
            return tiny.fintune(*words)._asdict()
        verb, *arguments = words[1:]
        out, code = io.StringIO(), 0
        with contextlib.redirect_stdout(out), mock.patch("sys.stdin", io.StringIO(asked["text"])):
            try:
                getattr(cases_product, verb.replace("-", "_"))(*arguments)
            except Exception:
                traceback.print_exc(file=out)
                code = 1
        return {"code": code, "out": out.getvalue(), "err": ""}


def programs(folder: Path, address: str) -> dict[str, str]:
    """Stand-ins for `fintune` and `python` that ask at an address; where they are."""
    client, product = folder / "client.py", str(cases_product.__file__)
    client.write_text(CLIENT)
    made = {"CASES_PRODUCT": product}
    for name in ("fintune", "python"):
        words = [sys.executable, "-SE", str(client), name, sys.executable, product, address]
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (folder / name).chmod(0o755)
        made[name.upper()] = str(folder / name)
    return made


def run(command: Path, folder: Path, demo: Path) -> str:
    """What a case's cmd.sh writes, both streams."""
    with (
        tempfile.TemporaryDirectory(prefix="case-") as short,  # a socket's path has 107 bytes
        socket.socket(socket.AF_UNIX) as server,
        (folder / "said").open("w+", errors="replace") as log,  # cut(1) may cut a character
    ):
        server.bind(f"{short}/socket")
        server.listen()
        server.settimeout(0.05)
        env = {**os.environ, "DEMO": str(demo), **programs(folder, f"{short}/socket")}
        process = subprocess.Popen(["bash", command], stdout=log, stderr=log, env=env)
        while process.poll() is None:
            with contextlib.suppress(TimeoutError), server.accept()[0] as client:
                client.settimeout(None)
                text = b"".join(iter(lambda: client.recv(1 << 16), b""))
                client.sendall(json.dumps(answered(json.loads(text))).encode())
        log.seek(0)
        return log.read()


def outcome(name: str, folder: Path, demo: Path, server: tiny.Server) -> Outcome:
    """A case's cmd.sh in a copy of its folder, with every call of the product noted."""
    place = folder / "cases" / name
    shutil.copytree(CASES / name, place)
    shutil.copy(CASES / "rows60.jsonl", folder / "cases")
    ports = {"8123": str(server.port), "8124": str(tiny.free_port())}
    for path in [*place.glob("*.sh"), *place.glob("*.py")]:
        text = path.read_text()
        path.write_text(re.sub("8123|8124", lambda found: ports[found[0]], text))
    case, real = Outcome(place, server), tiny.fintune

    def noted(*words: object, **others: Any) -> tiny.Said:
        case.calls.append(real(*words, **others))
        return case.calls[-1]

    with mock.patch.object(tiny, "fintune", noted):
        case.text = run(place / "cmd.sh", folder, demo)
    return case


@pytest.fixture(scope="session")
def names_are_keys(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every key that the cases set is one: else a refusal would prove nothing."""
    values = {name: tiny.SETTINGS[name][1] for name in cases_product.KEYS}
    values |= {"out": tmp_path_factory.mktemp("keys"), "source": tiny.rows(), "min_tokens": 5}
    small = [word for setting in cases_product.SMALL for word in ("-s", setting)]
    tiny.done("plan", *cases_product.BASE, *tiny.words(**values), *small)


@pytest.fixture(scope="module")
def same_answers(tmp_path_factory: pytest.TempPathFactory) -> tiny.Chain:
    """A release whose adapter answers every prompt alike, so that no answer tells two apart."""
    made = tiny.Chain(tmp_path_factory.mktemp("same") / "tiny", {})
    steps = {"max_steps": 8, "eval_steps": 8, "save_steps": 8, "learning_rate": 0.1}
    words = tiny.chain(made.out, **steps)
    for verb in tiny.VERBS:
        tiny.done(verb, *words, *(["--accept", "a test"] if verb == "release" else []))
    return made


def check_set_up(case: Outcome, short: str) -> None:
    """What every outcome must have, right or wrong: commands that were reached, with keys that are.

    Raises:
        RuntimeError: the case says nothing about the product.
    """
    stale = [call.err for call in case.calls if STALE.search(call.err)]
    if stale:
        raise RuntimeError(f"a name is stale: {stale[0]}")
    if short[0] in "sc" and not case.calls:
        _ = case.reply  # of curl; anything else is no reply
    elif not case.calls:
        raise RuntimeError(f"no command was reached: {case.text}")
    if short[0] == "t" and case.calls[0].code:
        raise RuntimeError(f"the rows were not prepared: {case.calls[0].err}")


WHY = {name: why for why, names in NOT_YET.items() for name in names.split()}


def marked(name: str) -> Any:
    """A case, expected to fail where the table says so."""
    short = name.partition("-")[0]
    # Only the check may fail as expected: a set-up that is broken is no AssertionError.
    expected = pytest.mark.xfail(reason=WHY.get(short), strict=True, raises=AssertionError)
    marks = [expected] if short in WHY else []
    return pytest.param(name, marks=[*marks, *([pytest.mark.slow] if short in SLOW else [])])


@pytest.mark.skipif(not NAMES, reason=f"no cases at {CASES}")
@pytest.mark.parametrize("name", map(marked, NAMES))
@pytest.mark.usefixtures("names_are_keys")
def test_case(
    name: str,
    tmp_path: Path,
    chain: tiny.Chain,
    server: tiny.Server,
    request: pytest.FixtureRequest,
) -> None:
    short = name.partition("-")[0]
    check = check_of(short)
    if short in SLOW:
        alike = request.getfixturevalue("same_answers")
        other = tiny.Server(alike.release, tmp_path / "log")
        case = outcome(name, tmp_path, alike.out, other)
        other.stop()
    else:
        case = outcome(name, tmp_path, chain.out, server)
    check_set_up(case, short)
    for call in case.calls:
        assert "Traceback" not in call.err + call.out, call.err
    assert check(case), f"MUST: {(CASES / name / 'MUST').read_text()}\n{case.text}"


def test_every_case_has_a_check_and_every_name_of_the_table_a_case() -> None:
    shorts = [name.partition("-")[0] for name in NAMES]
    for short in shorts:
        check_of(short)
    assert not shorts or {*WHY} <= {*shorts}
