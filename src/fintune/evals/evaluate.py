"""The evaluation of a run: base and adapter on the same prompts, graded, and a verdict.

`eval/` grows in place. `predictions.jsonl` and `heldout.jsonl` gain a line as soon as it is
known, so that a killed evaluation continues where it was; `test_results.json` and `report.html`
are made from the raw files alone (`rescore`).
"""

import contextlib
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import torch
import transformers
from accelerate.utils import send_to_device

import fintune
from fintune import attention, model, seal
from fintune.chat import ChatFormat
from fintune.collate import padded_batch, padding_free_batch
from fintune.config import Config, EvalConfig
from fintune.console import meter, say
from fintune.errors import ConfigError, DataError, NotFinite, OutputError
from fintune.evals import judge, results
from fintune.evals.grading import VARIANTS, HeldOutItems, Item, Pair, load_pairs
from fintune.evals.tasks import source_hash, task_items
from fintune.files import JsonlLog, read_json, sha256_bytes, sha256_json, write_json, write_jsonl
from fintune.generation import Request, generate
from fintune.loss import causal_model, sum_loss
from fintune.untrusted.probe import stop_token_ids

Prompts = list[tuple[Item, list[int]]]
BATCH_TOKENS = 4096
"""Most tokens of one forward pass of the held-out loss, unless one row alone is longer."""
REGRESSION_QUESTIONS = 200
"""Most questions of each task of lm-eval."""
METRICS = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")
"""Per-question scores that a task of lm-eval may report; the first it has is compared."""


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
    base = model.find_base(config.model, kept_in=[config.run_dir])
    folder, inputs = config.eval_dir, _inputs(config, base)
    with seal.lock(folder):
        if fresh:
            seal.move_aside(folder)
        kept = seal.finished(folder, inputs, command=results.COMMAND)
        if not kept:
            seal.start(folder, inputs)
            _answer(config, base, folder, inputs)
            found = _finish(folder, inputs, judge.raw_rows(_judged_set(folder)))
        planned = judge.plan(_judged_set(folder), config.eval.judge, config.seed)
        if {call.key for call in planned} - judge.finished(folder).keys():
            found = _judge(config, folder, inputs, judge_host)
        elif kept:
            say(f"{folder}: unchanged, kept")
            return read_json(folder / results.RESULTS)
    return _show(found)


def judge_answers(
    config: Config, *, judge_host: str = "", labels: Path | None = None
) -> dict[str, Any]:
    """Ask the judge about a finished evaluation's answers and make its results anew.

    Args:
        judge_host: a host that may get the judge's key besides the variable's own.
        labels: human verdicts to compare with, JSON Lines of id and verdict.

    Raises:
        ConfigError: no judge is configured. OutputError: the evaluation is unfinished.
    """
    folder = config.eval_dir
    inputs = results.read_evaluation(folder)["inputs"]
    if config.eval.judge.model is None:
        raise ConfigError("no judge is configured", fix="--set eval.judge.model=MODEL")
    with seal.lock(folder):
        found = _judge(config, folder, inputs, judge_host, labels)
    return _show(found)


def _judge(
    config: Config, folder: Path, inputs: dict[str, Any], host: str, labels: Path | None = None
) -> dict[str, Any]:
    """Make the results again with the judge's verdicts; until all are in, those before stay."""
    pairs, settings = _judged_set(folder), config.eval.judge
    planned = judge.plan(pairs, settings, config.seed)
    done = judge.ask(folder, planned, settings, host)
    return _finish(folder, inputs, judge.raw_rows(pairs, planned, done, settings.model, labels))


def _finish(folder: Path, inputs: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / seal.DONE).unlink(missing_ok=True)
    write_jsonl(folder / judge.NAME, rows)
    found = results.write_results(folder)
    seal.seal(folder, inputs)
    return found


def _show(found: dict[str, Any]) -> dict[str, Any]:
    accuracy, loss = found["accuracy"], found["loss"]
    for name in VARIANTS:
        say(f"{name}: accuracy {accuracy[name] or 0:.1%}, held-out loss {loss[name]:.3f}")
    for sentence in results.words(found):
        say(sentence)
    return found


def _judged_set(folder: Path) -> list[Pair]:
    """The items of the judged set with both answers."""
    chosen = set(read_json(folder / "run.json")["judged"])
    return [pair for pair in load_pairs(folder) if pair.item.id in chosen]


def _inputs(config: Config, base: model.Base) -> dict[str, Any]:
    data = seal.read_data(config.data_dir)
    adapter = "best/adapter_model.safetensors"
    run = seal.read_seal(
        config.run_dir, stage="training run", make="fintune train", needed=[adapter]
    )
    trained = run["inputs"].get("base", base.record)["revision"]
    if trained != base.revision:
        what = f"the run was trained on {base.id} at {trained}, this base is {base.revision}"
        raise OutputError(what, fix="set model.revision and model.path as they were")
    apart = {"out", "judge", "tasks"}  # paths say nothing on another machine
    return {
        **{part: data["files"][f"{part}.parquet"]["sha256"] for part in ("train", "test")},
        "adapter": run["files"][adapter]["sha256"],
        "base": config.model.id,
        "base_revision": base.revision,
        "quantization": config.model.quantization,
        "date_string": config.chat.date_string,
        "precision": config.train.precision,
        "seed": config.seed,
        "settings": config.eval.model_dump(mode="json", exclude=apart),
        "tasks": {name: source_hash(source) for name, source in config.eval.tasks.items()},
    }


def _answer(config: Config, base: model.Base, folder: Path, inputs: dict[str, Any]) -> None:
    """Held-out loss and answers of both models, from one copy of the base weights."""
    choice, on = config.train.precision, model.device()
    tokenizer = model.load_tokenizer(base)
    chat = ChatFormat(tokenizer, config.chat.date_string)
    rows = pq.read_table(config.data_dir / "test.parquet").to_pylist()
    if not rows:
        what = f"{config.data_dir / 'test.parquet'} has no row"
        raise DataError(what, fix="prepare more rows, or raise data.test_share")
    # fp32 on a CPU: the answers are then those of the plain `generate` of any other program.
    dtype = model.precision("fp32" if choice == "auto" and on.type == "cpu" else choice, on)
    bare = model.load_base(base, config.model.quantization, dtype, attention=attention.NAME)
    peft_model = model.load_adapter(bare, config.run_dir / "best")
    prompts, facts = _choose(config, rows, chat, bare.config.max_position_embeddings)
    facts["provenance"] = {
        **inputs,
        "precision": dtype,
        "decoding": "greedy",
        "packages": {
            each.__name__: each.__version__ for each in (fintune, torch, transformers, peft)
        },
        "device": torch.cuda.get_device_name() if on.type == "cuda" else "cpu",
    }
    write_json(folder / "run.json", facts)
    _measure_loss(folder, peft_model, rows, tokenizer.pad_token_id)
    ends, size = stop_token_ids(base.folder, tokenizer), config.eval.per_device_eval_batch_size
    ask = partial(generate, peft_model, tokenizer, stop_token_ids=ends, batch_size=size)
    _generate(folder, peft_model, ask, prompts, config.eval.max_new_tokens)
    if config.eval.regression and not (folder / "regression.json").is_file():
        found = {}
        for variant in VARIANTS:
            with _enabled(peft_model, variant):
                found[variant] = _regression(peft_model, tokenizer, config.eval)
        write_json(folder / "regression.json", found)


def _enabled(peft_model: Any, variant: str) -> Any:
    """The adapter switched off for `base`, on for `adapter`, while the block runs."""
    return peft_model.disable_adapter() if variant == "base" else contextlib.nullcontext()


def _choose(
    config: Config, rows: list[dict[str, Any]], chat: ChatFormat, longest: int
) -> tuple[Prompts, dict[str, Any]]:
    """The items to answer with their prompts' ids, and what run.json says of the choice."""

    def by_hash(items: list[Item], salt: str = "") -> list[Item]:
        return sorted(items, key=lambda item: sha256_bytes(f"{salt}{item.id}".encode()))

    train = pq.ParquetFile(config.data_dir / "train.parquet")
    batches = train.iter_batches(1024, columns=["messages", "group"])
    reader = HeldOutItems(row for batch in batches for row in batch.to_pylist())
    own = by_hash([reader.item(row) for row in rows])
    items = [item for item in own if item.kind != "text"][: config.eval.max_items]
    for name, source in config.eval.tasks.items():
        items += task_items(name, source, config.eval.max_items)
    if sum(item.kind in results.CHECKED for item in items) < results.FEWEST_CHECKABLE:
        items += [item for item in own if item.kind == "text"][: config.eval.judged_items]
    if len({item.id for item in items}) < len(items):
        raise OutputError("eval.tasks: two items share their id", fix="give each line its own `id`")
    most = longest - config.eval.max_new_tokens
    encoded = [(item, chat.prompt_ids(item.messages)) for item in items]
    prompts = [(item, ids) for item, ids in encoded if len(ids) <= most]
    fitting, decided = [item for item, _ in prompts], {item.id for item in own}
    pool = [item for item in fitting if item.id in decided or item.kind == "text"]
    return prompts, {
        "primary": config.eval.primary,
        "seed": config.seed,
        "judged": [item.id for item in by_hash(pool, "judged:")[: config.eval.judged_items]],
        "contaminated": [item.id for item in fitting if reader.saw(item)],
    }


def _measure_loss(folder: Path, peft_model: Any, rows: list[dict[str, Any]], pad: int) -> None:
    """Sums over the label tokens of each source's rows, by both models."""
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    with JsonlLog(folder / "heldout.jsonl") as file, meter("held-out loss", len(rows)) as progress:
        done = {cell["source"] for cell in file.rows()}
        for source in sorted({row["source"] for row in rows} - done):
            chosen = [row for row in rows if row["source"] == source]
            cell = {"source": source, "rows": len(chosen)}
            for variant in VARIANTS:
                with _enabled(peft_model, variant):
                    cell[variant], cell["tokens"] = _loss_sum(peft_model, chosen, pad)
            file.append(cell)
            progress.advance(len(chosen))


def _loss_sum(peft_model: Any, rows: list[dict[str, Any]], pad: int) -> tuple[float, int]:
    """Sum of the cross-entropy (nats) and label tokens of rows, longest first.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    padding_free = attention.why_padded(causal_model(peft_model)) is None
    total, tokens, start = 0.0, 0, 0
    while start < len(rows):
        end = start + max(1, BATCH_TOKENS // len(rows[start]["input_ids"]))
        batch, start = rows[start:end], end
        made = padding_free_batch(batch) if padding_free else padded_batch(batch, pad)
        with torch.inference_mode():
            loss, count = sum_loss(peft_model, send_to_device(made, peft_model.device))
        total += float(loss)
        tokens += count
    if not math.isfinite(total):
        raise NotFinite("the held-out loss is not finite", fix="or try --set train.precision=fp32")
    return total, tokens


def _regression(peft_model: Any, tokenizer: Any, config: EvalConfig) -> dict[str, dict[str, float]]:
    """Score of every question of lm-eval by task and question, of the model as it is.

    Raises:
        ConfigError: the `lm_eval` package is missing, or a task is unknown or has no such score.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        what = "eval.regression needs lm-eval-harness, which is not installed"
        raise ConfigError(what, fix="pip install 'fintune[regression]'") from None
    files = [Path(name) for name in config.regression if name.endswith(".yaml")]
    tasks = [name for name in config.regression if not name.endswith(".yaml")]
    tasks += [file.stem for file in files]
    manager = TaskManager(include_path=[str(file.parent) for file in files])
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ConfigError(f"eval.regression: lm-eval knows no task {', '.join(unknown)}")
    ran = simple_evaluate(
        model=HFLM(
            pretrained=peft_model.get_base_model(),
            tokenizer=tokenizer,
            batch_size=config.per_device_eval_batch_size,
        ),
        tasks=tasks,
        task_manager=manager,
        limit=REGRESSION_QUESTIONS,
        bootstrap_iters=0,
        apply_chat_template=True,
        log_samples=True,
    )
    found: dict[str, dict[str, float]] = {}
    for task, samples in ran["samples"].items():
        metric = next((name for name in METRICS if samples and name in samples[0]), None)
        if metric is None:
            raise ConfigError(f"eval.regression: {task} reports none of {', '.join(METRICS)}")
        kept = [each for each in samples if each.get("filter") == samples[0].get("filter")]
        found[task] = {str(sample["doc_id"]): float(sample[metric]) for sample in kept}
    return found


def _generate(folder: Path, peft_model: Any, ask: Any, prompts: Prompts, limit: int) -> None:
    """Answers by both models to every item not yet answered, appended batch by batch."""
    path, by_id = folder / "predictions.jsonl", {item.id: (item, ids) for item, ids in prompts}
    with JsonlLog(path) as file, meter("answers", 2 * len(prompts)) as progress:
        done = {(row["model"], row["item"]["id"]) for row in file.rows()}
        progress.advance(len(done))
        for variant in VARIANTS:
            left = [(key, ids) for key, (_, ids) in by_id.items() if (variant, key) not in done]
            with _enabled(peft_model, variant):
                for batch in ask([Request(key, ids, limit) for key, ids in left]):
                    file.append(*(_line(variant, *by_id[one.id], one) for one in batch))
                    progress.advance(len(batch), note=variant)
        rows = {(row["item"]["id"], row["model"]): row for row in file.rows()}
    write_jsonl(path, [rows[key, variant] for key in by_id for variant in VARIANTS])


def _line(variant: str, item: Item, ids: list[int], answer: Request) -> dict[str, Any]:
    return {
        "model": variant,
        "text": answer.text,
        "tokens": len(answer.token_ids),
        "finish": answer.finish_reason,
        "prompt_sha256": sha256_json(ids),
        "item": asdict(item),
    }
