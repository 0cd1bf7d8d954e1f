"""The evaluation of a run: base and adapter on the same prompts, graded, and a verdict.

`eval/` grows in place. `predictions.jsonl` and `heldout.jsonl` gain a line as soon as it is
known, so that a killed evaluation continues where it was; `test_results.json` and `report.html`
are made from the raw files alone (`rescore`).
"""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import torch
import transformers

import fintune
from fintune import attention, model, seal
from fintune.chat import ChatFormat
from fintune.config import Config
from fintune.console import meter, say, table
from fintune.errors import ConfigError, DataError, OutputError
from fintune.evals import calls, heldout, raw, regression
from fintune.evals.lines import Lines
from fintune.evals.report import COMMAND, read_evaluation, write_results
from fintune.evals.results import CHECKED, FEWEST_CHECKABLE, WHO, Pair, load_pairs, words
from fintune.evals.tasks import DecideItems, Item, source_hash, task_items
from fintune.example import Message
from fintune.files import read_json, sha256_bytes, sha256_json, write_json, write_jsonl
from fintune.generate import Prompt, answer_all


def evaluate(config: Config, *, fresh: bool = False, judge_host: str = "") -> dict[str, Any]:
    """Evaluate the best adapter of a run against its base.

    Args:
        fresh: move an existing evaluation aside instead of keeping or continuing it.
        judge_host: a host that may get the judge's key besides the variable's own.

    Returns:
        The content of test_results.json.

    Raises:
        OutputError: the run or its data are unfinished, or the folder belongs to other inputs.
        DataError: no `decide` row. GateRefused: the judge's budget is spent.
    """
    folder, inputs = config.eval_dir, _inputs(config)
    with seal.lock(folder):
        if fresh:
            seal.move_aside(folder)
        state = seal.state(folder, inputs, command=COMMAND)
        if state is not seal.State.FINISHED:
            seal.start(folder, inputs)
            _answer(config, folder, inputs)
        elif not raw.pending(folder, _judged(folder), config.eval.judge, config.seed):
            say(f"{folder}: unchanged, kept")
            return read_json(folder / "test_results.json")
        return _finish(config, folder, inputs, judge_host)


def judge_answers(config: Config, *, judge_host: str = "") -> dict[str, Any]:
    """Ask the judge about a finished evaluation's answers and make its results anew.

    Raises:
        ConfigError: no judge is configured. OutputError: the evaluation is unfinished.
    """
    folder = config.eval_dir
    read_evaluation(folder)  # before anything is made there
    if config.eval.judge.model is None:
        raise ConfigError("no judge is configured", fix="--set eval.judge.model=MODEL")
    with seal.lock(folder):
        done = read_evaluation(folder)
        return _finish(config, folder, done["inputs"], judge_host)


def _finish(
    config: Config, folder: Path, inputs: dict[str, Any], judge_host: str
) -> dict[str, Any]:
    judge, judged = config.eval.judge, _judged(folder)
    if raw.pending(folder, judged, judge, config.seed):
        calls.api_key(judge, judge_host)  # a refusal leaves a finished evaluation as it is
    (folder / seal.DONE).unlink(missing_ok=True)
    rows = raw.judged_rows(folder, judged, judge, config.seed, judge_host)
    write_jsonl(folder / raw.NAME, rows)
    found = write_results(folder)
    seal.seal(folder, inputs)
    accuracy = found["accuracy"]
    table(
        f"evaluation of {config.run_dir}",
        ["", "base", "adapter"],
        [
            ["held-out loss", *(f"{found['loss'][who]:.3f}" for who in WHO)],
            ["accuracy", *(f"{accuracy[who] or 0:.1%}" for who in WHO)],
        ],
    )
    for sentence in words(found):
        say(sentence)
    return found


def _judged(folder: Path) -> list[Pair]:
    """The items of the judged set with both answers."""
    chosen = set(read_json(folder / "run.json")["judged"])
    return [pair for pair in load_pairs(folder) if pair.item.id in chosen]


def _inputs(config: Config) -> dict[str, Any]:
    data = seal.read_data(config.data_dir)
    adapter = "best/adapter_model.safetensors"
    run = seal.read_seal(
        config.run_dir, stage="training run", make="fintune train", needed=[adapter]
    )
    apart = {"out", "judge", "tasks", "regression_folder"}  # paths say nothing on another machine
    settings = config.eval.model_dump(mode="json", exclude=apart)
    return {
        "train": data["files"]["train.parquet"]["sha256"],
        "validation": data["files"]["validation.parquet"]["sha256"],
        "adapter": run["files"][adapter]["sha256"],
        "base": config.model.id,
        "base_revision": model.find_base(config.model).revision,
        "quantization": config.model.quantization,
        "date_string": config.chat.date_string,
        "precision": config.train.precision,
        "seed": config.seed,
        "settings": settings,
        "tasks": {name: source_hash(source) for name, source in config.eval.tasks.items()},
    }


def _answer(config: Config, folder: Path, inputs: dict[str, Any]) -> None:
    """Held-out loss and answers of both models, from one copy of the base weights."""
    base = model.find_base(config.model)
    tokenizer = model.load_tokenizer(base)
    chat = ChatFormat(tokenizer, config.chat.date_string)
    rows = _decide_rows(config)
    on = model.device()
    choice = config.train.precision
    # fp32 on a CPU: the answers are then those of the plain `generate` of any other program.
    dtype = model.precision("fp32" if choice == "auto" and on.type == "cpu" else choice, on)
    bare = model.load_base(base, config.model.quantization, dtype, attention=attention.NAME)
    both = model.load_adapter(bare, config.run_dir / "best")
    items, facts = _choose(config, rows, chat, bare.config.max_position_embeddings)
    write_json(folder / "run.json", {**facts, **_provenance(config, base, dtype, inputs)})
    _measure_loss(folder, both, rows, tokenizer.pad_token_id)
    ends = model.end_token_ids(base, tokenizer)
    _generate(config, folder, both, tokenizer, chat, items, ends)
    if config.eval.regression and not (folder / "regression.json").is_file():
        found = {}
        for who in WHO:
            with _as(both, who):
                found[who] = regression.scores(both, tokenizer, config.eval)
        write_json(folder / "regression.json", found)


@contextlib.contextmanager
def _as(both: Any, who: str) -> Iterator[None]:
    """The adapter switched off for `base`, on for `adapter`."""
    with both.disable_adapter() if who == "base" else contextlib.nullcontext():
        yield


def _decide_rows(config: Config) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        config.data_dir / "validation.parquet", filters=[("part", "=", "decide")]
    ).to_pylist()
    if not rows:
        raise DataError(
            f"{config.data_dir / 'validation.parquet'} holds no `decide` row",
            why="the rows that chose the checkpoint cannot also judge it",
            fix="prepare more rows, or raise data.validation_share",
        )
    return rows


def _choose(
    config: Config, rows: list[dict[str, Any]], chat: ChatFormat, longest: int
) -> tuple[list[Item], dict[str, Any]]:
    """The items to answer, and what run.json says about how they were chosen."""
    seen: set[str] = set()
    groups: set[str] = set()

    def train() -> Iterator[list[Message]]:
        file = pq.ParquetFile(config.data_dir / "train.parquet")
        for batch in file.iter_batches(1024, columns=["messages", "group"]):
            for row in batch.to_pylist():
                groups.add(row["group"])
                messages = [Message(**message) for message in row["messages"]]
                seen.add(_asked(messages[:-1]))
                yield messages

    reader = DecideItems(train())
    found = sorted(
        (reader.item(row) for row in rows), key=lambda item: sha256_bytes(item.id.encode())
    )
    checkable = [item for item in found if item.kind != "text"][: config.eval.max_items]
    items, decided = list(checkable), {item.id for item in checkable}
    for name, source in config.eval.tasks.items():
        items += task_items(name, source, config.eval.max_items)
    if sum(item.kind in CHECKED for item in items) < FEWEST_CHECKABLE:
        items += [item for item in found if item.kind == "text"][: config.eval.judged_items]
    room = longest - config.eval.max_new_tokens
    fitting = [item for item in items if len(chat.prompt_ids(item.messages)) <= room]
    pool = sorted(
        (item for item in fitting if item.id in decided or item.kind == "text"),
        key=lambda item: sha256_bytes(f"judged:{item.id}".encode()),
    )
    leaked = [item.id for item in fitting if _asked(item.messages) in seen or item.group in groups]
    return fitting, {
        "primary": config.eval.primary,
        "seed": config.seed,
        "judged": [item.id for item in pool[: config.eval.judged_items]],
        "contaminated": leaked,
        "too_long": len(items) - len(fitting),
        "data": {
            "decide_rows": len(rows),
            "checkable": len([item for item in found if item.kind != "text"]),
            "rows_sha256": sha256_json([row["example_id"] for row in rows]),
        },
    }


def _asked(messages: Any) -> str:
    """A prompt as compared with the training prompts: its words, case and spacing apart."""
    text = "\n".join(f"{message.role} {message.content}" for message in messages)
    return sha256_bytes(" ".join(text.casefold().split()).encode("utf-8", "backslashreplace"))


def _provenance(
    config: Config, base: model.Base, dtype: str, inputs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "models": {
            "base": {"id": base.id, "revision": base.revision},
            "adapter": {"sha256": inputs["adapter"]},
            "precision": dtype,
            "quantization": config.model.quantization,
        },
        "settings": {
            **inputs["settings"],
            "tasks": inputs["tasks"],
            "decoding": "greedy",
            "date_string": config.chat.date_string,
        },
        "packages": {
            module.__name__: module.__version__ for module in (fintune, torch, transformers, peft)
        },
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
        },
    }


def _measure_loss(folder: Path, both: Any, rows: list[dict[str, Any]], pad: int) -> None:
    found = heldout.cells(rows)
    with Lines(folder / "heldout.jsonl") as file, meter("held-out loss", len(rows)) as progress:
        done = {(row["source"], row["length"]) for row in file.rows()}
        for (source, band), chosen in found.items():
            progress.advance(len(chosen))
            if (source, band) in done:
                continue
            totals = {}
            for who in WHO:
                with _as(both, who):
                    parts = list(heldout.sums(both, chosen, pad))
                totals[who] = sum(total for total, _ in parts)
                tokens = sum(count for _, count in parts)
            file.append(
                {"source": source, "length": band, "rows": len(chosen), "tokens": tokens, **totals}
            )


def _generate(
    config: Config,
    folder: Path,
    both: Any,
    tokenizer: Any,
    chat: ChatFormat,
    items: list[Item],
    ends: list[int],
) -> None:
    """Answers by both models to every item not yet answered, appended batch by batch."""
    ids = {item.id: chat.prompt_ids(item.messages) for item in items}
    by_id = {item.id: item for item in items}
    if len(by_id) < len(items):
        raise OutputError(f"{len(items) - len(by_id)} items share their id with another")
    path = folder / "predictions.jsonl"
    with Lines(path) as file, meter("answers", 2 * len(items)) as progress:
        done = {(row["model"], row["item"]["id"]) for row in file.rows()}
        progress.advance(len(done))
        for who in WHO:
            prompts = [Prompt(key, ids[key]) for key in by_id if (who, key) not in done]
            with _as(both, who):
                for batch in answer_all(
                    both,
                    tokenizer,
                    prompts,
                    ends=ends,
                    max_new_tokens=config.eval.max_new_tokens,
                    batch_size=config.eval.batch_size,
                ):
                    made = [
                        {
                            "model": who,
                            "text": answer.text,
                            "tokens": answer.tokens,
                            "finish": answer.finish,
                            "prompt_sha256": sha256_json(ids[answer.id]),
                            "item": by_id[answer.id].as_json(),
                        }
                        for answer in batch
                    ]
                    file.append(*made)
                    progress.advance(len(batch), note=who)
        place = {key: at for at, key in enumerate(by_id)}
        rows = sorted(
            file.rows(), key=lambda row: (place[row["item"]["id"]], -WHO.index(row["model"]))
        )
    write_jsonl(path, rows)
