"""The evaluation: base and adapter answer the same prompts, are graded and compared.

`eval/` is written in place. `predictions.jsonl` and `heldout.jsonl` get each line as soon as it is
computed, so that a killed evaluation continues; `test_results.json` and `report.html` are made
from these files alone (`results.rescore`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from fintune import attention, cpu, model, seal
from fintune.chat import ChatFormat
from fintune.collate import padded_batch, padding_free_batch
from fintune.config import Config
from fintune.console import meter, say, warn
from fintune.errors import NotFinite, OutputError
from fintune.evals import endpoint, history, judge, judging, results, subject, verdict
from fintune.evals.grading import VARIANTS, HeldOutItems, Item, as_example, by_document
from fintune.evals.kept import KeptAnswers
from fintune.evals.likelihood import Labelled, log_likelihoods, with_choices
from fintune.evals.served import Served, find_models
from fintune.evals.subject import Speakers, Subject
from fintune.evals.tasks import find_questions, identity, suite_tasks, task_items
from fintune.example import Example
from fintune.files import JsonlLog, read_json, sha256_bytes, sha256_json, write_json, write_jsonl
from fintune.generation import Request, generate
from fintune.judgings import looks_dir
from fintune.loss import causal_model, sum_loss
from fintune.rewording import contaminated
from fintune.sources import Source, recorded_commits

Prompts = list[tuple[Item, list[int]]]
Tasks = dict[str, list[Source]]
Json = dict[str, Any]
PACKAGES = ("fintune", "torch", "transformers", "peft")
FINAL = "final"
"""The part of the prepared rows that is kept back (`data.final_share`)."""
BATCH_TOKENS = 4096
"""Most tokens of one forward pass of the held-out loss; a longer row is a batch by itself."""


def evaluate(
    config: Config,
    *,
    fresh: bool = False,
    judge_host: str = "",
    final: bool = False,
    again: str = "",
    other: subject.Other | None = None,
) -> dict[str, Any]:
    """Evaluate the best adapter of a run, or another, against its base.

    Args:
        fresh: move an existing evaluation aside instead of keeping or continuing it.
        judge_host: another host that may get the judge's key (see `judge.api_key`).
        final: ask the part of the rows that was kept back (`data.final_share`), without tasks, in
            a folder of its own beside the evaluation's.
        again: why that part is opened another time.
        other: an adapter of another trainer, or a merged model, in place of the run's.

    Returns:
        The content of test_results.json; with a judge, of its judging.

    Raises:
        OutputError: the run or its data are unfinished, or the folder belongs to other inputs.
        DataError: no test row. GateRefused: the judge's budget is spent, the part kept back was
        opened before, or an adapter of others failed a check. ModelError: it lacks a file.
    """
    part = FINAL if final else "test"
    if final:
        place = config.eval_dir.with_name(f"{config.eval_dir.name}-{FINAL}")
        settings = config.eval.model_copy(update={"out": place, "tasks": {}, "suite": None})
        config = config.model_copy(update={"eval": settings})
    folder, looks = config.eval_dir, looks_dir(config)
    judged = subject.of_others(config, other, part) if other else subject.of_run(config, part)
    tasks = _find_tasks(config, fresh)
    inputs = _inputs(config, judged, tasks)
    with seal.lock(folder):
        if fresh:
            seal.move_aside(folder)
        if seal.finished(folder, inputs, command=results.COMMAND):
            say(f"{folder}: unchanged, kept")
        else:
            most = config.eval.max_items
            asked = [item for name in tasks for item in task_items(name, tasks[name], most)]
            if final:
                history.open_final(looks, inputs, again)
            if config.eval.server.url:
                find_models(config.eval.server)
            seal.start(folder, inputs)
            _answer(config, judged, folder, inputs, asked, fresh)
            write_jsonl(folder / judge.NAME, judge.raw_rows(judging.judged_set(folder)))
            found = results.write_results(folder)
            seal.seal(folder, inputs)
            history.note(looks, inputs, found["verdict"])
        if config.eval.judge.model and not endpoint.keyless(config.eval.judge, judge_host):
            judging.ask(config, judge_host)
    found = results.tell(endpoint.shown_dir(config, judge_host))
    endpoint.tell_unjudged(config.eval.judge, judge_host, found)
    return found


def check_tasks(config: Config, *, fresh: bool = False) -> None:
    """Read the questions of every task, before hours of training.

    Raises:
        ConfigError, DataError: as of `find_questions` and `task_items`.
    """
    for name, sources in _find_tasks(config, fresh).items():
        task_items(name, sources, config.eval.max_items)


def _find_tasks(config: Config, fresh: bool) -> Tasks:
    """Where the tasks' questions lie.

    A hub id is at the commit that this evaluation began with, else at the one that the training
    rows were compared with.
    """
    prepared = seal.recorded_inputs(config.data_dir).get("benchmarks", {})
    begun = {} if fresh else seal.recorded_inputs(config.eval_dir).get("tasks", {})
    return find_questions(suite_tasks(config.eval), recorded_commits(prepared, begun))


def _inputs(config: Config, judged: Subject, tasks: Tasks) -> dict[str, Any]:
    # Paths are others on another machine.
    excluded = {"out", "judge", "tasks", "suite", "server"}
    served = {name: getattr(config.eval.server, name) for name in VARIANTS}
    asked = suite_tasks(config.eval)
    return {
        **({"server": served} if config.eval.server.url else {}),
        **judged.facts,
        "base": config.model.id,
        "base_revision": judged.base.revision,
        "base_about": judged.base.about,
        "quantization": config.model.quantization,
        "chat": config.chat.model_dump(mode="json"),
        "precision": config.train.precision,
        "seed": config.seed,
        "settings": config.eval.model_dump(mode="json", exclude=excluded),
        "tasks": {name: identity(asked[name], sources) for name, sources in tasks.items()},
    }


def _answer(
    config: Config,
    judged: Subject,
    folder: Path,
    inputs: dict[str, Any],
    asked: list[Item],
    fresh: bool,
) -> None:
    """Held-out loss and answers of base and adapter."""
    precision, device = config.train.precision, model.device()
    cpu.set_threads(cpu.free_threads())
    chat = judged.chat(config)
    rows = judged.rows(chat)
    run: Json = {"run": _about(config, judged, folder, len(asked))}
    run["looks"] = history.looks(looks_dir(config), inputs)
    if config.eval.server.url:
        _answer_served(config, judged, chat, folder, inputs, rows, asked, run)
        return
    if precision == "auto" and device.type == "cpu":
        precision = "fp32"  # the answers are then those of transformers' own `generate`
    dtype = model.precision(precision, device)
    speakers = judged.speakers(config.model.quantization, dtype)
    with speakers.speaking("base") as base:
        context = model.context_length(base)
    prompts, run_info = _choose(config, judged, rows, asked, chat, context)
    run_info["provenance"] = {
        **inputs,
        "precision": dtype,
        "decoding": "greedy",
        "base_answers": "generated, here or in an evaluation before of all that is named here",
        "packages": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **judged.provenance(len(run_info["repeated"])),
    }
    fitting = [row for row in rows if len(row["input_ids"]) <= context]
    run_info |= run | ({} if fitting else {"loss_missing": "no row is held out"})
    write_json(folder / "run.json", run_info)
    _measure_loss(folder, speakers, fitting, chat.tokenizer.pad_token_id)
    facts = {
        "weights": model.weights_sha256(judged.base.folder),
        "packages": run_info["provenance"]["packages"],
        "precision": dtype,
        "stops": sorted(chat.stop_token_ids),
    }
    kept = KeptAnswers(facts | {"quantization": config.model.quantization}, read=not fresh)
    answer = partial(generate, chat=chat, batch_size=config.eval.per_device_eval_batch_size)
    labelled = with_choices(chat, prompts) if config.eval.label_scoring == "likelihood" else {}
    limit = config.eval.max_new_tokens
    _generate(folder, speakers, answer, log_likelihoods, prompts, limit, chat, kept, labelled)


def _about(config: Config, judged: Subject, folder: Path, questions: int) -> dict[str, str]:
    """Name, date and rows of an evaluation; one that is continued keeps the day that it began."""
    path = folder / "run.json"
    begun = read_json(path).get("run", {}).get("date") if path.is_file() else None
    parts = [f"the {judged.part} part of the prepared rows"] if judged.data else []
    parts += [f"{questions} questions of tasks"] if questions else []
    day = begun or date.today().isoformat()
    return {"name": config.name, "date": day, "part": " and ".join(parts)}


def _answer_served(
    config: Config,
    judged: Subject,
    chat: ChatFormat,
    folder: Path,
    inputs: Json,
    rows: list[Json],
    asked: list[Item],
    run: Json,
) -> None:
    """Held-out loss and answers of base and adapter by a server, once both were found there."""
    server = Served(config, judged.base.folder, judged.folder, chat)
    prompts, run_info = _choose(config, judged, rows, asked, chat, server.context)
    run_info |= run | server.measure(folder, inputs, rows, [ids for _, ids in prompts])
    run_info["provenance"] |= judged.provenance(len(run_info["repeated"]))
    write_json(folder / "run.json", run_info)
    likely = config.eval.label_scoring == "likelihood"
    labelled = with_choices(chat, prompts) if likely else {}
    limit = config.eval.max_new_tokens
    _generate(folder, server, Served.answer, Served.score, prompts, limit, chat, None, labelled)


def _choose(
    config: Config,
    judged: Subject,
    rows: list[dict[str, Any]],
    asked: list[Item],
    chat: ChatFormat,
    context: int,
) -> tuple[Prompts, dict[str, Any]]:
    """The items to answer with the token ids of their prompts, and the fields of run.json.

    Items whose prompt leaves no space for an answer are left out.

    Args:
        rows: of test.parquet.
        asked: of the tasks.
        context: tokens of prompt and answer that the base takes.

    Raises:
        OutputError: two items share their id.
    """

    def by_hash(items: list[Item], salt: str = "") -> list[Item]:
        return sorted(items, key=lambda item: sha256_bytes(f"{salt}{item.id}".encode()))

    reader = HeldOutItems(judged.training_rows())
    # Of a row with an example an answer one line holds the messages; a call is no answer to grade.
    whole = [row for row in rows if row["messages"] and not row["messages"][-1].get("tool_calls")]
    test_items = by_hash([reader.item(row) for row in whole])
    repeated = _repeated(judged.known(), asked) | _repeated(judged.given(), asked + test_items)
    asked, test_items = (
        [item for item in items if item.id not in repeated] for items in (asked, test_items)
    )
    items = [item for item in test_items if item.kind != "text"][: config.eval.max_items] + asked
    if sum(item.kind in results.CHECKED for item in items) < verdict.FEWEST_CHECKABLE:
        items += [item for item in test_items if item.kind == "text"][: config.eval.judged_items]
    if len({item.id for item in items}) < len(items):
        raise OutputError("eval.tasks: two items share their id", fix="give each line its own `id`")
    longest = context - config.eval.max_new_tokens
    encoded = [(item, chat.prompt_ids(item.messages)) for item in items]
    prompts = [(item, ids) for item, ids in encoded if len(ids) <= longest]
    fitting, test_ids = [item for item, _ in prompts], {item.id for item in test_items}
    trained = {row["group"] for row in judged.training_rows()}
    contaminated_ids = [item.id for item in fitting if item.group in trained]
    fitting = by_document(fitting)
    prompts = [(item, ids) for item, (_, ids) in zip(fitting, prompts, strict=True)]
    _warn_of_no_documents([item for item in fitting if item.id not in test_ids])
    pool = [item for item in fitting if item.id in test_ids or item.kind == "text"]
    return prompts, {
        "primary": config.eval.primary,
        "max_task_drop": config.eval.max_task_drop,
        "seed": config.seed,
        "judged": [item.id for item in by_hash(pool, "judged:")[: config.eval.judged_items]],
        "repeated": sorted(repeated),
        "contaminated": contaminated_ids,
    }


def _repeated(known: Iterator[list[Example]], asked: list[Item]) -> set[str]:
    """Ids of the questions that a training row repeats, verbatim or reworded."""
    questions, found = [as_example(item) for item in asked], set[str]()
    for rows in known if questions else ():
        found |= {hit["benchmark_sha256"] for hit in contaminated(rows, questions).values()}
    if found:
        names = Counter(item.task for item in asked if item.id in found)
        counts = ", ".join(f"{count} of {name}" for name, count in sorted(names.items()))
        warn(f"training rows repeat questions, which are not asked: {counts}")
    return found


def _warn_of_no_documents(asked: list[Item]) -> None:
    """Say which tasks' questions count as independent, as nothing tells their documents."""
    often = Counter((item.task, item.group) for item in asked)
    shared = {task for (task, _), count in often.items() if count > 1}
    if alone := {item.task for item in asked} - shared:
        warn(
            f"{', '.join(sorted(alone))}: no two questions share a document, so they count as "
            "independent; where some do, name it in each line: context_id"
        )


def _measure_loss(folder: Path, speakers: Speakers, rows: list[dict[str, Any]], pad: int) -> None:
    """Append each source's sums of the loss over label tokens, of base and adapter."""
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    count = len(VARIANTS) * len(rows)
    with JsonlLog(folder / "heldout.jsonl") as file, meter("held-out loss", count) as progress:
        done = {cell["source"] for cell in file.rows()}
        todo = sorted({row["source"] for row in rows} - done)
        # Where a change of the model loads one, each is loaded once.
        for group in [[source] for source in todo] if speakers.shared else [todo]:
            chosen = {name: [row for row in rows if row["source"] == name] for name in group}
            cells = {name: {"source": name, "rows": len(chosen[name])} for name in group}
            for variant in VARIANTS if group else ():
                with speakers.speaking(variant) as speaker:
                    for name, cell in cells.items():
                        sums = _loss_sum(speaker, chosen[name], pad, progress.advance)
                        cell[variant], cell["tokens"] = sums
            file.append(*cells.values())


def _loss_sum(
    peft_model: Any, rows: list[dict[str, Any]], pad: int, done: Callable[[int], None]
) -> tuple[float, int]:
    """Sum of the cross-entropy (nats) over the label tokens of rows, and their number.

    Args:
        rows: the longest first.
        pad: id of the padding token.
        done: takes the number of rows of each batch.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    padding_free = attention.why_padded(causal_model(peft_model)) is None
    total, tokens, start = 0.0, 0, 0
    while start < len(rows):
        # Padded, no batch has more: `plan_evaluation` counts the tokens of its rows alone.
        end = start + max(1, BATCH_TOKENS // len(rows[start]["input_ids"]))
        batch, start = rows[start:end], end
        tensors = padding_free_batch(batch) if padding_free else padded_batch(batch, pad)
        with torch.inference_mode():
            loss, count = sum_loss(peft_model, send_to_device(tensors, peft_model.device))
        total += float(loss)
        tokens += count
        done(len(batch))
    if not math.isfinite(total):
        raise NotFinite("the held-out loss is not finite", fix="or try --set train.precision=fp32")
    return total, tokens


def _generate(
    folder: Path,
    speakers: Speakers | Served,
    answer: Any,
    score: Any,
    prompts: Prompts,
    limit: int,
    chat: ChatFormat,
    kept: KeptAnswers | None,
    labelled: dict[str, Labelled],
) -> None:
    """Answer every item by base and adapter; lines of an interrupted evaluation are kept.

    Args:
        answer: `generate` with its chat format and batch size; `score`: `log_likelihoods`.
        limit: most tokens of an answer.
        kept: answers of the base from earlier evaluations; None: none is kept.
        labelled: items by id whose choices are compared by their likelihoods instead.
    """
    path, by_id = folder / "predictions.jsonl", {item.id: (item, ids) for item, ids in prompts}
    with JsonlLog(path) as file, meter("answers", 2 * len(prompts)) as progress:
        done = {(row["model"], row["item"]["id"]) for row in file.rows()}
        progress.advance(len(done))
        for variant in VARIANTS:
            keys = [key for key in by_id if (variant, key) not in done]
            todo = {key: Request(key, by_id[key][1], limit) for key in keys if key not in labelled}
            if variant == "base" and kept:
                known = _kept(kept, todo, chat)
                file.append(*(_line(variant, *by_id[each.id], each) for each in known))
                progress.advance(len(known))
            asked = [labelled[key] for key in keys if key in labelled]
            if not asked and not todo:
                continue
            with speakers.speaking(variant) as speaker:
                for scored in score(speaker, asked) if asked else ():
                    file.append(
                        *(_labelled(variant, by_id[q.id][0], q, likely) for q, likely in scored)
                    )
                    progress.advance(len(scored), note=variant)
                for batch in answer(speaker, requests=todo.values()):
                    file.append(*(_line(variant, *by_id[each.id], each) for each in batch))
                    if variant == "base" and kept:
                        kept.keep(batch)
                    progress.advance(len(batch), note=variant)
        rows = {(row["item"]["id"], row["model"]): row for row in file.rows()}
    write_jsonl(path, [rows[key, variant] for key in by_id for variant in VARIANTS])


def _kept(kept: KeptAnswers, todo: dict[str, Request], chat: ChatFormat) -> list[Request]:
    """Take the requests from `todo` that the base has answered in an earlier evaluation."""
    known = kept.fill(todo.values())
    for request in known:
        request.text, request.in_thought = chat.answer(request.token_ids)
        del todo[request.id]
    if known:
        say(f"{len(known)} answers of the base are kept from an earlier evaluation")
    return known


def _labelled(variant: str, item: Item, asked: Labelled, likely: list[float]) -> dict[str, Any]:
    """A line of predictions.jsonl whose answer is the likeliest choice."""
    best = likely.index(max(likely))
    answer = Request(item.id, asked.prompt_ids, 0, finish_reason="stop", text=item.choices[best])
    answer.token_ids = list(asked.choice_ids[best])
    logprobs = dict(zip(item.choices, (round(each, 5) for each in likely), strict=True))
    return _line(variant, item, asked.prompt_ids, answer) | {"choice_logprobs": logprobs}


def _line(variant: str, item: Item, ids: list[int], answer: Request) -> dict[str, Any]:
    return {
        "model": variant,
        "text": answer.text,
        "tokens": len(answer.token_ids),
        "finish": answer.finish_reason,
        "in_thought": answer.in_thought,
        "prompt_sha256": sha256_json(ids),
        "item": asdict(item),
    }
