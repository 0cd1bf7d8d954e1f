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
from fintune.evals import heldout, judged, regression
from fintune.evals.items import VARIANTS, HeldOutItems, Item, Pair, load_pairs
from fintune.evals.report import COMMAND, RESULTS, read_evaluation, write_results
from fintune.evals.results import CHECKED, FEWEST_CHECKABLE, words
from fintune.evals.tasks import source_hash, task_items
from fintune.example import Message
from fintune.files import JsonlLog, read_json, sha256_bytes, sha256_json, write_json, write_jsonl
from fintune.generation import Request, generate


def evaluate(config: Config, *, fresh: bool = False, judge_host: str = "") -> dict[str, Any]:
    """Evaluate the best adapter of a run against its base.

    Args:
        fresh: move an existing evaluation aside instead of keeping or continuing it.
        judge_host: a host that may get the judge's key besides the variable's own.

    Returns:
        The content of test_results.json.

    Raises:
        OutputError: the run or its data are unfinished, or the folder belongs to other inputs.
        DataError: no test row. GateRefused: the judge's budget is spent.
    """
    folder, inputs = config.eval_dir, _inputs(config)
    with seal.lock(folder):
        if fresh:
            seal.move_aside(folder)
        if seal.state(folder, inputs, command=COMMAND) is not seal.State.FINISHED:
            seal.start(folder, inputs)
            _answer(config, folder, inputs)
            _finish(folder, inputs, judged.unjudged_rows(_judged_set(folder)))
        elif not judged.pending(folder, _judged_set(folder), config.eval.judge, config.seed):
            say(f"{folder}: unchanged, kept")
            return read_json(folder / RESULTS)
        if config.eval.judge.model is not None:
            _judge(config, folder, inputs, judge_host)
    return _show(config)


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
        _judge(config, folder, read_evaluation(folder)["inputs"], judge_host)
    return _show(config)


def _judge(config: Config, folder: Path, inputs: dict[str, Any], judge_host: str) -> None:
    """Make the results again with the judge's verdicts; until all are in, those before stay."""
    material = (_judged_set(folder), config.eval.judge, config.seed, judge_host)
    _finish(folder, inputs, judged.judged_rows(folder, *material))


def _finish(folder: Path, inputs: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    (folder / seal.DONE).unlink(missing_ok=True)
    write_jsonl(folder / judged.NAME, rows)
    write_results(folder)
    seal.seal(folder, inputs)


def _show(config: Config) -> dict[str, Any]:
    found = read_json(config.eval_dir / RESULTS)
    accuracy = found["accuracy"]
    table(
        f"evaluation of {config.run_dir}",
        ["", "base", "adapter"],
        [
            ["held-out loss", *(f"{found['loss'][variant]:.3f}" for variant in VARIANTS)],
            ["accuracy", *(f"{accuracy[variant] or 0:.1%}" for variant in VARIANTS)],
        ],
    )
    for sentence in words(found):
        say(sentence)
    return found


def _judged_set(folder: Path) -> list[Pair]:
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
        "test": data["files"]["test.parquet"]["sha256"],
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
    rows = _test_rows(config)
    on = model.device()
    choice = config.train.precision
    # fp32 on a CPU: the answers are then those of the plain `generate` of any other program.
    dtype = model.precision("fp32" if choice == "auto" and on.type == "cpu" else choice, on)
    bare = model.load_base(base, config.model.quantization, dtype, attention=attention.NAME)
    peft_model = model.load_adapter(bare, config.run_dir / "best")
    items, facts = _choose(config, rows, chat, bare.config.max_position_embeddings)
    write_json(folder / "run.json", {**facts, **_provenance(config, base, dtype, inputs)})
    _measure_loss(folder, peft_model, rows, tokenizer.pad_token_id)
    ends = model.end_token_ids(base, tokenizer)
    _generate(config, folder, peft_model, tokenizer, chat, items, ends)
    if config.eval.regression and not (folder / "regression.json").is_file():
        found = {}
        for variant in VARIANTS:
            with _enabled(peft_model, variant):
                found[variant] = regression.scores(peft_model, tokenizer, config.eval)
        write_json(folder / "regression.json", found)


def _enabled(peft_model: Any, variant: str) -> contextlib.AbstractContextManager[None]:
    """The adapter switched off for `base`, on for `adapter`."""
    off: contextlib.AbstractContextManager[None] = peft_model.disable_adapter()
    return off if variant == "base" else contextlib.nullcontext()


def _test_rows(config: Config) -> list[dict[str, Any]]:
    path = config.data_dir / "test.parquet"
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    if not rows:
        raise DataError(
            f"{path} has no row",
            why="the rows that chose the checkpoint cannot also judge it",
            fix="prepare more rows, or raise data.test_share",
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

    reader = HeldOutItems(train())
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
            "test_rows": len(rows),
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


def _measure_loss(folder: Path, peft_model: Any, rows: list[dict[str, Any]], pad: int) -> None:
    found = heldout.cells(rows)
    with JsonlLog(folder / "heldout.jsonl") as file, meter("held-out loss", len(rows)) as progress:
        done = {(row["source"], row["length"]) for row in file.rows()}
        for (source, band), chosen in found.items():
            progress.advance(len(chosen))
            if (source, band) in done:
                continue
            totals = {}
            for variant in VARIANTS:
                with _enabled(peft_model, variant):
                    parts = list(heldout.sums(peft_model, chosen, pad))
                totals[variant] = sum(total for total, _ in parts)
                tokens = sum(count for _, count in parts)
            file.append(
                {"source": source, "length": band, "rows": len(chosen), "tokens": tokens, **totals}
            )


def _generate(
    config: Config,
    folder: Path,
    peft_model: Any,
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
    with JsonlLog(path) as file, meter("answers", 2 * len(items)) as progress:
        done = {(row["model"], row["item"]["id"]) for row in file.rows()}
        progress.advance(len(done))
        limit = config.eval.max_new_tokens
        for variant in VARIANTS:
            keys = [key for key in by_id if (variant, key) not in done]
            requests = [Request(key, ids[key], limit) for key in keys]
            with _enabled(peft_model, variant):
                for batch in generate(
                    peft_model,
                    tokenizer,
                    requests,
                    stop_token_ids=ends,
                    batch_size=config.eval.per_device_eval_batch_size,
                ):
                    made = [
                        {
                            "model": variant,
                            "text": answer.text,
                            "tokens": len(answer.token_ids),
                            "finish": answer.finish_reason,
                            "prompt_sha256": sha256_json(ids[answer.id]),
                            "item": by_id[answer.id].as_json(),
                        }
                        for answer in batch
                    ]
                    file.append(*made)
                    progress.advance(len(batch), note=variant)
        place = {key: at for at, key in enumerate(by_id)}
        rows = sorted(
            file.rows(), key=lambda row: (place[row["item"]["id"]], -VARIANTS.index(row["model"]))
        )
    write_jsonl(path, rows)
