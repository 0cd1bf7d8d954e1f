"""Every stage of the product on every base below a folder, through the command line.

    python bench/bases.py DIR [NAME ...]     writes bench/results/bases.json

DIR holds a folder a base, as `build_bases.py` beside the sample data makes them: tiny random
weights, the true architecture, tokenizer and chat template. Each base is prepared, trained for
three steps, evaluated, released, verified, served for one request and exported merged. What was
prepared and trained is held against transformers and peft alone: prompts against
`apply_chat_template`, loss and every adapter gradient of eight rows against plain forward and
backward passes, row by row, in fp32 without dropout.

`fintune bases` and docs/bases.md are made from the results.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# In a fork, torch's thread pool is made anew by the first thread that needs it, without a lock:
# two loading threads at once end in "Invalid thread pool" about once in a thousand loads.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"

import tiny  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402

Facts = dict[str, Any]
RESULTS = ROOT / "bench" / "results" / "bases.json"
KNOWN = ROOT / "src" / "fintune" / "bases.json"
"""What `fintune bases` shows."""
HOW = (
    "Each with random weights in the base's own architecture, its tokenizer and its chat template:"
    " prepared, trained, evaluated, released, verified, served and merged; loss and gradients as"
    " by transformers and peft alone."
)
STAGES = ("prepare", "train", "equal", "eval", "release", "verify", "serve", "export")
LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
"""Largest difference of the mean loss; norm of a gradient's difference over its own."""
PEFT_ROWS = 8
SECONDS = 300
"""Longest time of a command."""


def main(folder: Path, names: list[str]) -> None:
    """Try the bases, one after the other, and write the results after each."""
    preload()
    known = {} if not names else {row["base"]: row for row in _known()}
    for base in bases(folder, names):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fintune-bases-") as work:
            row = try_base(base, Path(work))
        known[base.name] = row
        seconds = time.monotonic() - start
        line = f"{base.name:22} {row['result']:10} {seconds:6.1f} s  {_said(row)}"
        print(line, flush=True)  # noqa: T201
        write(list(known.values()))


def _known() -> list[Facts]:
    rows: list[Facts] = json.loads(RESULTS.read_text())["bases"] if RESULTS.is_file() else []
    return rows


def bases(folder: Path, names: list[str]) -> Iterator[Path]:
    """Folders of the bases to try."""
    for path in sorted(folder.iterdir()):
        if (path / "config.json").is_file() and (not names or path.name in names):
            yield path


def preload() -> None:
    """Import once what every command imports; they run in forks of this process."""
    torch.set_num_threads(1)
    for name in (
        "data.prepare",
        "training.train",
        "evals.evaluate",
        "releasing.export",
        "serve.app",
    ):
        __import__(f"fintune.{name}")


def write(rows: list[Facts]) -> None:
    """The results: counts, and a row a base."""
    works = sum(row["result"] == "works" for row in rows)
    results = {
        "versions": {name: version(name) for name in ("transformers", "peft", "torch")},
        "tried": len(rows),
        "works": works,
        "bases": sorted(rows, key=lambda row: str(row["base"])),
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    shown = ("id", "architecture", "result", "without_adapter", "fallbacks", "template")
    known = [{key: row.get(key) for key in shown} for row in results["bases"]]
    versions = {name: version(name) for name in ("transformers", "peft")}
    KNOWN.write_text(
        json.dumps({**versions, "how": HOW, "bases": known}, ensure_ascii=False) + "\n"
    )


def _said(row: Facts) -> str:
    failed = {stage: said for stage, said in row["stages"].items() if said != "ok"}
    equal = "; ".join(f"{key} {row[key]:.0e}" for key in row if key.endswith("_difference"))
    return "; ".join(f"{stage}: {said}" for stage, said in failed.items()) or equal


# ---- one base ----------------------------------------------------------------------------------


def try_base(base: Path, work: Path, stages: tuple[str, ...] = STAGES) -> Facts:
    """Take a base through the stages, up to the first that fails.

    Returns:
        `base`, `id`, `architecture`; `stages`: "ok", "refused: MESSAGE", "traceback: LINE" or what
        differs, by stage; `result`: works, refused (at once, by a message) or fails.
    """
    config = json.loads((base / "config.json").read_text())
    row: Facts = {"base": base.name, "id": public_id(base.name), "stages": {}}
    row["architecture"] = config["architectures"][0]
    settings = write_config(base, work)
    for stage in stages:
        said = _STAGES[stage](base, work, settings, row)
        row["stages"][stage] = said
        if said != "ok":
            break
    last = [*row["stages"].values()][-1]
    done = last == "ok" and len(row["stages"]) == len(stages)
    row["result"] = "works" if done else "refused" if last.startswith("refused") else "fails"
    return row


@cache
def builder() -> Any:
    """`build_bases.py` beside the sample data, as a module."""
    path = tiny.SHARED / "bases" / "build_bases.py"
    os.environ.setdefault("BASES_OUT", tempfile.gettempdir())
    spec = importlib.util.spec_from_file_location("build_bases", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_id(name: str) -> str:
    """The hub's id of a base that `build_bases.py` knows."""
    known = builder().B.get(name.removesuffix("~arch"))
    return known[0] if known and name in builder().B else name


def write_config(base: Path, work: Path) -> Path:
    """Rows and a config for a base."""
    (work / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    tree = {
        "name": "matrix",
        "out": str(work / "out"),
        "model": {"id": f"bench/{base.name.replace('~', '-')}", "path": str(base)},
        "data": {
            "source": str(work / "rows.jsonl"),
            "min_tokens": 5,
            "max_length": 512,
            "pii": "off",
            "validation_share": 0.2,
            "test_share": 0.2,
        },
        "train": {
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.01,
            "eval_steps": 3,
            "save_steps": 3,
            "logging_steps": 1,
            "max_eval_samples": 4,
            "precision": "fp32",
        },
        "eval": {"max_new_tokens": 4, "max_items": 6, "judged_items": 4},
    }
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rows() -> list[Facts]:
    """Rows of the shared cases, and conversations of several turns made of them."""
    lines = (tiny.SHARED / "cases" / "rows60.jsonl").read_text("utf-8").splitlines()
    single = [row for line in lines if isinstance((row := json.loads(line)).get("user"), str)]
    made = []
    for first, second in zip(single[::2], single[1::2], strict=False):
        turns = [{"role": "system", "content": "You answer questions about companies."}]
        for row in (first, second):
            turns += [{"role": role, "content": row[role]} for role in ("user", "assistant")]
        made.append({"messages": turns[len(made) % 2 :]})
    return single + made[:12]


def _command(work: Path, *words: object) -> tuple[str, str]:
    """How a command ended ("ok", or what it said) and everything it wrote."""
    process = tiny.Forked(*words, log=work / "log")
    code = process.wait(SECONDS)
    text = process.text()
    if "Traceback (most recent call last)" in text:
        return f"traceback: {text.strip().splitlines()[-1][:300]}", text
    if code:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        at = max((i for i, line in enumerate(lines) if line.startswith("error")), default=-3)
        return f"refused: {' '.join(lines[at:])[:400]} (exit {code})", text
    return "ok", text


def _prepare(base: Path, work: Path, config: Path, row: Facts) -> str:
    said, _ = _command(work, "prepare", "-c", config)
    return said if said != "ok" else _forked(lambda: check_prompts(base, work), row)


def _train(base: Path, work: Path, config: Path, row: Facts) -> str:
    said, _ = _command(work, "train", "-c", config)
    if said == "ok":
        environment = json.loads((work / "out/run/environment.json").read_text())
        adapter = json.loads((work / "out/run/best/adapter_config.json").read_text())
        row["target_modules"] = adapter["target_modules"]
        row["without_adapter"] = environment["without_adapter"]
        row["fallbacks"] = environment["fallbacks"]
    return said


def _equal(base: Path, work: Path, config: Path, row: Facts) -> str:
    return _forked(lambda: compare(base, work / "out" / "data"), row)


def _verb(*words: object) -> Callable[[Path, Path, Path, Facts], str]:
    return lambda base, work, config, row: _command(work, words[0], "-c", config, *words[1:])[0]


def _verify(base: Path, work: Path, config: Path, row: Facts) -> str:
    return _command(work, "verify", work / "out" / "release", "--base", base)[0]


def _serve(base: Path, work: Path, config: Path, row: Facts) -> str:
    try:
        server = tiny.Server(work / "out" / "release", work / "log", on=base)
    except AssertionError as error:
        return f"fails: {str(error).strip().splitlines()[-1][:300]}"
    question = [{"role": "user", "content": "What is EBITDA?"}]
    answers = []
    for model in ("adapter", "base"):
        body = {"model": model, "messages": question, "max_tokens": 6, "temperature": 0}
        answers.append(server.ask("/v1/chat/completions", body))
    server.stop()
    wrong = [f"{status}: {text[:200]}" for status, text in answers if status != 200]
    return f"fails: {wrong[0]}" if wrong else "ok"


def _export(base: Path, work: Path, config: Path, row: Facts) -> str:
    words = ("export", "merged", work / "out" / "release", "--out", work / "merged")
    said, text = _command(work, *words, "--base", base, "--dtype", "fp32")
    if said != "ok":
        return said
    row["merged"] = text.strip().splitlines()[0][:200]
    return _forked(lambda: check_merged(base, work), row)


_STAGES: dict[str, Callable[[Path, Path, Path, Facts], str]] = {
    "prepare": _prepare,
    "train": _train,
    "equal": _equal,
    "eval": _verb("eval"),
    "release": _verb("release", "--accept", "a matrix of bases"),
    "verify": _verify,
    "serve": _serve,
    "export": _export,
}


def _forked(work: Callable[[], Facts], row: Facts) -> str:
    """Run a comparison in a fork; its facts go into the row. "ok", or its key `wrong`."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            answer = work()
        except BaseException as error:  # the row says what it was
            answer = {"wrong": f"traceback: {type(error).__name__}: {str(error)[:300]}"}
        with os.fdopen(writer, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        facts = json.loads(file.read() or '{"wrong": "the comparison crashed"}')
    os.waitpid(pid, 0)
    wrong = facts.pop("wrong", "")
    row |= facts
    return wrong or "ok"


# ---- against transformers and peft alone -------------------------------------------------------


def prepared(data: Path) -> list[Facts]:
    """The training rows."""
    import pyarrow.parquet as pq

    table: list[Facts] = pq.read_table(data / "train.parquet").to_pylist()
    return table


def check_prompts(base: Path, work: Path) -> Facts:
    """Of every answer: its prompt as a server renders it, and what is trained of it, decoded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = json.loads((work / "out" / "data" / "manifest.json").read_text())["chat"]
    found, wrong, examples = prepared(work / "out" / "data"), [], []
    for row in found:
        examples.append(row)
        if not row["messages"]:  # the last example of a conversation has them
            continue
        turns = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        at = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = [(each, span) for each in examples for span in trained_spans(each["labels"])]
        examples = []
        if len(spans) != len(at):
            wrong.append(f"{len(spans)} trained parts for {len(at)} answers")
        for number, (each, (start, end)) in zip(at, spans, strict=False):
            text = served_prompt(tokenizer, turns[:number], chat["variables"])
            if each["input_ids"][:start] != tokenizer(text, add_special_tokens=False)["input_ids"]:
                ours = tokenizer.decode(each["input_ids"][:start])
                wrong.append(f"another prompt: {ours[-90:]!r} for {text[-90:]!r}")
            said = tokenizer.decode(each["labels"][start:end], clean_up_tokenization_spaces=False)
            lead, answer, tail = said.partition(turns[number]["content"].strip())
            if not answer or len(lead) > 60 or not tail.strip() or len(tail) > 40:
                wrong.append(f"trained {said[:60]!r}...{said[-60:]!r}")
    facts: Facts = {
        "rows": len(found),
        "longest": max(len(row["input_ids"]) for row in found),
        "end": chat["end"],
        "examples": chat["examples"],
        "template": chat["notes"],
    }
    return facts | ({"wrong": f"differs: {wrong[0]} ({len(wrong)} in all)"} if wrong else {})


def served_prompt(tokenizer: Any, turns: list[Facts], variables: Facts) -> str:
    """What a server renders on the day of the config, by the policies that the manifest states."""

    def rendered(messages: list[Facts]) -> str:
        with mock.patch("transformers.utils.chat_template_utils.datetime", _Day):
            text: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **variables
            )
        return text

    if turns[0]["role"] != "system":
        return rendered(turns)
    with suppress(Exception):  # a template that raises, or writes no system text
        if turns[0]["content"] in (text := rendered(turns)):
            return text
    first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return rendered([first, *turns[2:]])


class _Day(datetime):
    """The day that `chat.date_string` pins."""

    @classmethod
    def now(cls, tz: Any = None) -> "_Day":
        return cls(2024, 7, 26)


def trained_spans(labels: list[int]) -> list[tuple[int, int]]:
    """Start and end of every run of trained tokens."""
    bounds, before = [], -100
    for at, label in enumerate([*labels, -100]):
        if (label == -100) != (before == -100):
            bounds.append(at)
        before = label
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def compare(base: Path, data: Path) -> Facts:
    """Loss and gradients of eight rows: ours, and plain transformers and peft row by row."""
    chosen = prepared(data)[:PEFT_ROWS]
    ours, names, count = _our_gradients(base, chosen)
    loss, theirs = _plain_gradients(base, chosen, names)
    apart = abs(ours.pop("loss") - loss)
    worst, where = 0.0, ""
    for name, gradient in theirs.items():
        norm = float(gradient.norm())
        gap = float((ours[name] - gradient).norm()) / norm if norm else float(ours[name].norm())
        if not gap <= worst:
            worst, where = gap, name
    facts: Facts = {"loss_difference": apart, "gradient_difference": worst, "adapters": count}
    if not apart <= LOSS_LIMIT or not worst <= GRADIENT_LIMIT:
        facts["wrong"] = f"differs: loss {apart:.1e}, gradient {worst:.1e} of {where}"
    return facts


def _lora(**changes: Any) -> Facts:
    return {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | changes


def _our_gradients(base: Path, chosen: list[Facts]) -> tuple[Facts, Facts, int]:
    """Gradients by name and `loss`; the adapter's config and weights; how many it has."""
    from fintune import model
    from fintune.attention import why_padded
    from fintune.collate import Collator
    from fintune.config import LoraConfig
    from fintune.loss import sum_loss
    from fintune.training import lora, pointwise

    loaded = model.load_base(model.Base("bench/base", "", base), "none", "fp32")
    padding_free = why_padded(loaded) is None
    peft = model.attach(loaded, LoraConfig(**_lora()), 1)
    _set_b(peft)
    pointwise.fuse(peft)
    lora.fuse(peft)
    total, labels = sum_loss(peft.train(), Collator(padding_free, 0, 32)(chosen))
    (total / labels).backward()
    grads = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient: {missing[:3]}"
    weights = {name: p.detach() for name, p in peft.named_parameters() if p.requires_grad}
    settings = peft.active_peft_config
    names = {"target_modules": settings.target_modules, "exclude_modules": settings.exclude_modules}
    return {"loss": float(total) / labels, **grads}, {"weights": weights, **names}, len(grads) // 2


def _set_b(peft: Any) -> None:
    """peft begins with B = 0, where A has no gradient."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)


def _plain_gradients(base: Path, chosen: list[Facts], ours: Facts) -> tuple[float, Facts]:
    """Mean loss over label tokens, and gradients by name: nothing of this project in it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    causal = type(AutoConfig.from_pretrained(base)) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    weights = ours.pop("weights")
    settings = LoraConfig(**_lora(), **ours, task_type="CAUSAL_LM")
    peft = get_peft_model(kind.from_pretrained(base, dtype=torch.float32), settings).train()
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert trained.keys() == weights.keys(), "other modules have an adapter"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    count = sum(label != -100 for row in chosen for label in row["labels"][1:])
    total = 0.0
    for row in chosen:
        labels = torch.tensor(row["labels"][1:])
        logits = peft(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad for name, parameter in trained.items()}


def check_merged(base: Path, work: Path) -> Facts:
    """The merged folder loads in plain transformers, and its logits are the adapter's."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    def load(folder: Path) -> Any:
        causal = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
        kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"], f"{folder.name} lacks {sorted(info['missing_keys'])[:3]}"
        return model.eval()

    ids = torch.tensor([prepared(work / "out" / "data")[0]["input_ids"][:64]])
    adapted = PeftModel.from_pretrained(load(base), work / "out" / "release").eval()
    with torch.inference_mode():
        theirs = adapted(input_ids=ids).logits
        merged = load(work / "merged")(input_ids=ids).logits
    gap = float((merged - theirs).abs().max() / theirs.abs().max())
    wrong = {} if gap <= 1e-4 else {"wrong": f"differs: merged logits by {gap:.1e} of the largest"}
    return {"merged_difference": gap, **wrong}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
    shutil.rmtree(ROOT / "bench" / "__pycache__", ignore_errors=True)
