"""The form that is served: merged, in 4 bits or as a GGUF file, against the adapter as trained.

A form answers the questions of a finished evaluation: the same prompts, to the token. Its folder,
`forms/NAME` in the evaluation's, has a seal of its own and changes no file of the evaluation.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fintune import cpu, model, seal
from fintune.chat import ChatFormat
from fintune.config import Config, ModelConfig
from fintune.console import meter, say
from fintune.errors import ConfigError, ModelError, OutputError, UsageError, failing, needing
from fintune.evals import compare, results, stats
from fintune.evals.grading import PHRASES, Item, Pair
from fintune.evals.likelihood import log_likelihoods, with_choices
from fintune.evals.subject import Other, Subject, of_others, of_run
from fintune.files import JsonlLog, read_json, read_jsonl, sha256_file, sha256_json, write_json
from fintune.generation import Request, generate
from fintune.page import save_page

Json = dict[str, Any]
COMMAND = "fintune eval --form"
_FORM = re.compile(r"(4bit)|(merged)(?::(bf16|fp16|fp32))?|gguf:(.+)")
SAME_CUT = 20
"""Prompts that a GGUF file's own tokenizer must cut as the base's does."""


@dataclass(frozen=True)
class Form:
    """A form of an adapter: `4bit`, `merged` in a precision, or the GGUF file of a merged model."""

    kind: str
    dtype: model.PrecisionName | None = None
    file: Path | None = None

    @classmethod
    def of(cls, text: str) -> "Form":
        """From the command line.

        Raises:
            UsageError: it names none. OutputError: no such file.
            ConfigError: llama-cpp-python is not installed, and the form needs it.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            what = f"--form {text}: no form"
            raise UsageError(what, fix="merged, merged:fp16, merged:fp32, 4bit, or gguf:FILE")
        if match[1]:
            return cls("4bit")
        if match[2]:
            return cls("merged", match[3] or "bf16")  # type: ignore[arg-type]
        file = Path(match[4]).expanduser()
        if not file.is_file():
            raise OutputError(
                f"no GGUF file at {file}", fix="make it: fintune export gguf --merged"
            )
        with needing("llama", "answering with a GGUF file"):
            import llama_cpp  # noqa: F401
        return cls("gguf", None, file)

    @property
    def name(self) -> str:
        """Of its folder, and on report and card."""
        if self.file:
            return f"gguf-{re.sub(r'[^A-Za-z0-9._-]+', '-', self.file.name.removesuffix('.gguf'))}"
        return f"{self.kind}-{self.dtype}" if self.dtype else self.kind

    @property
    def facts(self) -> Json:
        """What its answers depend on besides the evaluation."""
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "file": self.file and sha256_file(self.file),
        }


def answer_as(
    config: Config, text: str, *, other: Other | None = None, fresh: bool = False
) -> Json:
    """Ask a form of the adapter what a finished evaluation asked the adapter.

    Args:
        text: `merged[:PRECISION]`, `4bit` or `gguf:FILE`.
        other: as of `evaluate`.
        fresh: move the answers of this form aside first.

    Returns:
        The result of the comparison (`compare.compare`), with `equal`, the share of equal answers.

    Raises:
        UsageError: no form.
        OutputError: the evaluation is unfinished or of another adapter, or there is no file.
        ModelError: the file or the quantised base does not load, or cuts texts otherwise.
        ConfigError: llama-cpp-python is not installed, or cannot compare likelihoods of labels.
    """
    form, folder = Form.of(text), config.eval_dir
    place = folder / seal.FORMS / form.name
    judged = of_others(config, other, "test") if other else of_run(config, "test")
    tested = results.read_evaluation(folder)
    if tested["inputs"]["adapter"] != judged.facts["adapter"]:
        raise OutputError(f"{folder} is of another adapter", fix="evaluate this one first")
    answers = tested["files"][results.ANSWERS]["sha256"]
    inputs = {"answers": answers, "form": form.facts}
    with seal.lock(folder):
        if fresh:
            seal.move_aside(place)
        if seal.finished(place, inputs, command=COMMAND):
            say(f"{place}: unchanged, kept")
        else:
            seal.start(place, inputs)
            _answer(config, judged, form, place)
            _write(folder, place, form)
            seal.seal(place, inputs)
    compare.tell_form(place)
    return read_json(place / results.RESULTS)


def _answer(config: Config, judged: Subject, form: Form, place: Path) -> None:
    """Append the form's answers to its `predictions.jsonl`; those of an earlier start are kept."""
    chat, folder = judged.chat(config), config.eval_dir
    facts = read_json(folder / results.RUN)["provenance"]
    rows = [row for row in read_jsonl(folder / results.ANSWERS) if row["model"] == "adapter"]
    items = [Item.from_json(row["item"]) for row in rows]
    prompts = [(item, chat.prompt_ids(item.messages)) for item in items]
    asked = [row["prompt_sha256"] for row in rows]
    if [sha256_json(ids) for _, ids in prompts] != asked:
        what = "the prompts of this evaluation are written otherwise now"
        raise OutputError(what, fix="evaluate again: fintune eval --fresh")
    likelihood = facts["settings"]["label_scoring"] == "likelihood"
    labelled = with_choices(chat, prompts) if likelihood else {}
    if labelled and form.file:
        what = "a GGUF file cannot be asked for the likelihoods of labels"
        raise ConfigError(what, fix="evaluate with --set eval.label_scoring=generate")
    cpu.set_threads(cpu.free_threads())
    limit, size = config.eval.max_new_tokens, config.eval.per_device_eval_batch_size
    with JsonlLog(place / results.ANSWERS) as file, meter("answers", len(prompts)) as progress:
        done = {row["id"] for row in file.rows()}
        progress.advance(len(done))
        left = [(item, ids) for item, ids in prompts if item.id not in done]
        requests = [Request(i.id, ids, limit) for i, ids in left if i.id not in labelled]
        if form.file:
            ask: Any = partial(_llama, form.file, chat, prompts)
        elif left:
            loaded = _load(config, judged, form, facts["precision"])
            ask = partial(generate, loaded, chat, batch_size=size)
            scored = [labelled[item.id] for item, _ in left if item.id in labelled]
            for batch in log_likelihoods(loaded, scored) if scored else ():
                for each, likely in batch:
                    best = each.choices[likely.index(max(likely))]
                    file.append({"id": each.id, "text": best, "tokens": 0, "finish": "stop"})
                progress.advance(len(batch))
        for answered in ask(requests) if requests else ():
            file.append(*map(_line, answered))
            progress.advance(len(answered))


def _line(request: Request) -> Json:
    facts = {"tokens": len(request.token_ids), "finish": request.finish_reason}
    return {"id": request.id, "text": request.text, **facts, "in_thought": request.in_thought}


def _load(config: Config, judged: Subject, form: Form, precision: model.PrecisionName) -> Any:
    """The form as a model of transformers.

    Args:
        precision: of the evaluation, for what is not quantised.
    """
    if form.kind == "4bit":
        with failing("a base in 4 bits does not work here", ImportError, RuntimeError):
            if judged.other and judged.other.merged:
                own = model.find_base(ModelConfig(path=judged.folder))
                return model.load_base(own, "4bit", precision)
            return model.load_adapter(
                model.load_base(judged.base, "4bit", precision), judged.folder
            )
    whole = model.load_adapter(model.load_base(judged.base, "none", "fp32"), judged.folder)
    merged: Any = whole.merge_and_unload()  # in fp32, rounded once, as `fintune export merged` does
    return merged.to(model.DTYPES[form.dtype or "bf16"]).eval()


def _llama(
    file: Path, chat: ChatFormat, prompts: list[tuple[Item, list[int]]], requests: list[Request]
) -> Iterator[list[Request]]:
    """Answer requests one by one by llama.cpp, greedily.

    Args:
        prompts: all of the evaluation, of which some are cut by the file's own tokenizer.

    Raises:
        ModelError: the file does not load, or its tokenizer gives other ids.
    """
    import llama_cpp

    longest = max(len(each.prompt_ids) + each.max_new_tokens for each in requests)
    with failing(f"{file.name} does not load in llama.cpp", ValueError, RuntimeError):
        threads = torch.get_num_threads()
        llama = llama_cpp.Llama(str(file), n_ctx=longest, n_threads=threads, verbose=False)
    stops = {*chat.stop_token_ids}
    for text, ids in _plain(chat, prompts):
        if llama.tokenize(text.encode(), add_bos=False, special=True) != ids:
            what = f"{file.name} cuts texts into other tokens than the base's tokenizer"
            raise ModelError(what, why="its answers would be to other prompts")
    for request in requests:
        for token in llama.generate(request.prompt_ids, temp=0.0, repeat_penalty=1.0):
            request.append(int(token), stops)
            if request.finish_reason:
                break
        request.text, request.in_thought = chat.answer(request.token_ids)
        yield [request]


def _plain(
    chat: ChatFormat, prompts: Iterable[tuple[Item, list[int]]]
) -> Iterator[tuple[str, list[int]]]:
    """Some rendered prompts that spell no control token, which are tokenised whole."""
    found = ((chat.template.render(item.messages, prompt=True), ids) for item, ids in prompts)
    encode = partial(chat.tokenizer.encode, add_special_tokens=False)
    return islice(((text, ids) for text, ids in found if encode(text) == ids), SAME_CUT)


def _write(folder: Path, place: Path, form: Form) -> None:
    """test_results.json and report.html of a form, from its answers and the evaluation's."""
    trained = compare.read_side(compare.TRAINED, folder)
    said = {row["id"]: row["text"] for row in read_jsonl(place / results.ANSWERS)}
    pairs = {}
    for key, pair in trained.pairs.items():
        texts, graded = {"adapter": said[key]}, {"adapter": pair.item.grade(said[key])}
        pairs[key] = Pair(pair.item, pair.texts | texts, pair.graded | graded)
    served = replace(trained, name=form.name, pairs=pairs)
    found, compared = compare.compare(trained, served)
    same = [pair.texts["adapter"] == said[key] for key, pair in trained.pairs.items()]
    groups = [pair.item.group for pair in trained.pairs.values()]
    found |= {"equal": stats.rate(same, groups), "loss": None, "form": form.facts}
    write_json(place / results.RESULTS, found)
    save_page(place / results.REPORT, "compare", found=found, pairs=compared, phrases=PHRASES)
