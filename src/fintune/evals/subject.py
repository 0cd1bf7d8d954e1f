"""What is judged against its base: a run's adapter, one of another trainer, or a merged model.

A folder of others is checked before anything of it is loaded (`untrusted`): the adapter's tensors
must be those that peft makes on this base, and its tokenizer must give the base's ids.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch

from fintune import model, seal
from fintune.chat import ChatFormat
from fintune.config import Config, ModelConfig
from fintune.console import warn
from fintune.errors import DataError, ModelError, OutputError
from fintune.example import Example, Message
from fintune.files import sha256_bytes, sha256_file
from fintune.judgings import prepared
from fintune.sources import HUB_ID
from fintune.template import Refused
from fintune.untrusted import checks, probe
from fintune.untrusted.static import open_folder

Json = dict[str, Any]
ADAPTER = f"best/{checks.ADAPTER}"
ROWS_AT_ONCE = 20_000
"""Training rows that are compared with the questions at once: 0.3 GB of rows of 300 words."""


class Other(NamedTuple):
    """An adapter of another trainer, or a merged model, as the command line names it.

    Attributes:
        folder: of peft, or of the merged model.
        merged: it is a merged model.
        train_rows: rows that it was trained on, as far as they were given.
        train_rows_of: name and sha256 of the files that they are from.
    """

    folder: Path
    merged: bool = False
    train_rows: tuple[Example, ...] = ()
    train_rows_of: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is judged, and over which rows.

    Attributes:
        folder: of peft's adapter, or of a merged model.
        facts: what names it and its rows among an evaluation's inputs.
        part: of the prepared rows that is asked.
        data: folder of the prepared rows; None: the questions are those of tasks alone.
        other: where it is not the adapter of a run.
    """

    base: model.Base
    folder: Path
    facts: Json
    part: str
    data: Path | None
    other: Other | None = None

    def chat(self, config: Config) -> ChatFormat:
        """The base's tokenizer with its chat template, or with the one that the folder brings."""
        if self.other is None or not (own := probe.own_template(self.folder)):
            return model.load_chat(self.base, config.chat, self.data)
        tokenizer = model.load_tokenizer(self.base)
        if own != tokenizer.chat_template:
            warn(f"prompts are written by the chat template of {self.folder}, not by the base's")
        tokenizer.chat_template = own
        settings = model.prepared_chat(self.data, config.chat) if self.data else config.chat
        return ChatFormat(tokenizer, settings, probe.stop_token_ids(self.base.folder, tokenizer))

    def rows(self, chat: ChatFormat) -> list[Json]:
        """The prepared rows that are asked, for another's adapter with this base's token ids.

        Raises:
            DataError: there is none.
        """
        if self.data is None:
            return []
        path = self.data / f"{self.part}.parquet"
        rows: list[Json] = pq.read_table(path).to_pylist()
        if rows and self.other:
            rows = _encoded(rows, chat)
        if not rows:
            what = f"{path} has no row"
            raise DataError(what, fix="prepare more rows, or raise data.test_share")
        return rows

    def training_rows(self) -> Iterator[Json]:
        """The prepared training rows, with `messages` and `group`."""
        if self.data is not None:
            train = pq.ParquetFile(self.data / "train.parquet")
            for batch in train.iter_batches(ROWS_AT_ONCE, columns=["messages", "group"]):
                yield from batch.to_pylist()

    def known(self) -> Iterator[list[Example]]:
        """The prepared training rows as questions are compared with them, in batches."""
        whole = (row["messages"] for row in self.training_rows() if row["messages"])
        turns = (tuple(map(Message.of, messages)) for messages in whole)
        return _batches(Example("train", at, "", messages) for at, messages in enumerate(turns))

    def given(self) -> Iterator[list[Example]]:
        """The rows that are said to have trained an adapter of others, in batches."""
        return _batches(iter(self.other.train_rows if self.other else ()))

    def speakers(self, quantization: str, dtype: model.PrecisionName) -> "Speakers":
        """Base and subject, loaded: from one copy of the base's weights, or one after the other."""
        if self.other and self.other.merged:
            own = model.find_base(ModelConfig(path=self.folder))
            pair = {"base": self.base, "adapter": own}
            return Speakers(None, lambda name: model.load_base(pair[name], quantization, dtype))
        loaded = model.load_base(self.base, quantization, dtype)
        return Speakers(model.load_adapter(loaded, self.folder))

    def provenance(self, repeated: int) -> Json:
        """What is said of an adapter of others, and what of its training could be checked.

        Args:
            repeated: how many questions training rows repeat.
        """
        if self.other is None:
            return {}
        told = "What it was trained on is not known, nor whether these questions are among it"
        if self.data:
            told += " (they were compared with the training rows of the prepared data alone)"
        told += "; --train-rows FILE checks it."
        if rows := len(self.other.train_rows):
            names = ", ".join(name for name, _ in self.other.train_rows_of)
            told = (
                f"{rows:,} training rows of {names} were compared with the questions, of which "
                f"{repeated} are repeated and not asked; whether it was trained on other rows too "
                "is not known."
            )
        return {"subject": {**self.facts["subject"], "decontamination": told}}


class Speakers:
    """Base and subject as they answer.

    Args:
        peft_model: holds both in one copy of the base's weights; None: `load` gives each.

    Attributes:
        shared: changing from one to the other costs nothing.
    """

    def __init__(self, peft_model: Any, load: Callable[[str], Any] = lambda name: None) -> None:
        self._model, self._load, self._name = peft_model, load, ""
        self.shared = peft_model is not None

    @contextmanager
    def speaking(self, variant: str) -> Iterator[Any]:
        """The model of a variant, for as long as the block runs."""
        if self.shared:
            with model.adapter_set(self._model, variant == "adapter"):
                yield self._model
            return
        if variant != self._name:
            self._model = None  # before the other is loaded: there may be no space for both
            gc.collect()
            torch.cuda.empty_cache()
            self._model, self._name = self._load(variant), variant
        yield self._model


def of_run(config: Config, part: str) -> Subject:
    """The best adapter of a run, over the rows that it was prepared with.

    Raises:
        DataError: no such part. OutputError: run or data are unfinished, or of another base.
    """
    base = model.find_base(config.model, kept_in=[config.run_dir])
    data = _read_part(config, part)
    run = seal.read_seal(
        config.run_dir, stage="training run", make="fintune train", needed=[ADAPTER]
    )
    trained = run["inputs"].get("base", base.record)["revision"]
    if trained != base.revision:
        what = f"the run was trained on {base.id} at {trained}, this base is {base.revision}"
        raise OutputError(what, fix="set model.revision and model.path as they were")
    facts = {**data, "adapter": run["files"][ADAPTER]["sha256"]}
    return Subject(base, config.run_dir / "best", facts, part, config.data_dir)


def of_others(config: Config, other: Other, part: str) -> Subject:
    """An adapter of another trainer, or a merged model, checked against its base.

    Raises:
        OutputError: no such folder, or no adapter in it. GateRefused: a check of it failed.
        ModelError: no weights, no tokenizer, or one of other token ids.
        DataError: there is nothing to ask.
    """
    folder, rows = other.folder, prepared(config)
    if rows is None and not config.eval.tasks and config.eval.suite is None:
        what = "there is nothing to ask: neither prepared data nor tasks"
        raise DataError(what, fix="--data DIR, or --set eval.tasks.fpb=QUESTIONS.jsonl")
    data = _read_part(config, part) if rows else {"train": None, "test": None}
    base = (_checked_merged if other.merged else _checked_adapter)(config.model, folder)
    stated = checks.read_object(folder, checks.ADAPTER_CONFIG, absent=True)
    named = str(stated.get("base_model_name_or_path"))
    named = named if HUB_ID.fullmatch(named) and not Path(named).exists() else ""
    if named not in ("", base.id):
        warn(f"the adapter names {named} as its base, and is judged on {base.id}")
    facts = {
        "kind": "merged model" if other.merged else "adapter",
        "names_as_base": named or None,
        "adapter_config": None if other.merged else sha256_file(folder / checks.ADAPTER_CONFIG),
        "template": sha256_bytes((probe.own_template(folder) or "").encode()),
        "train_rows": dict(other.train_rows_of),
    }
    weights = model.weights_sha256(folder) if other.merged else sha256_file(folder / checks.ADAPTER)
    inputs = {**data, "adapter": weights, "subject": facts}
    return Subject(base, folder, inputs, part, rows, other)


def _batches(rows: Iterator[Example]) -> Iterator[list[Example]]:
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield batch


def _read_part(config: Config, part: str) -> Json:
    """sha256 of the training rows and of those that are asked. Raises DataError, OutputError."""
    data = seal.read_data(config.data_dir)
    if f"{part}.parquet" not in data["files"]:
        what = f"{config.data_dir} holds no {part} part"
        raise DataError(what, fix="prepare with a share of it: --set data.final_share=0.1 --fresh")
    names = {"train": "train", "test": part}
    return {key: data["files"][f"{name}.parquet"]["sha256"] for key, name in names.items()}


def _checked_adapter(wanted: ModelConfig, folder: Path) -> model.Base:
    """The base of an adapter, whose weights are fetched last, when the adapter is known to fit."""
    if not (folder / checks.ADAPTER_CONFIG).is_file():
        fix = "name the folder that peft saved; of a merged model: --model DIR"
        raise OutputError(f"{folder} holds no adapter (adapter_config.json)", fix=fix)
    if not (folder / checks.ADAPTER).is_file():
        why = "pickled weights (.bin, .pt) are never read"
        raise ModelError(f"{folder} holds no weights ({checks.ADAPTER})", why=why)
    report = checks.Report(folder)
    report.checks += open_folder(folder, "adapter")
    bare = model.find_base(wanted, weights=False)
    report.run(lambda: model.check_on_base(folder, bare))
    report.settle()
    return model.find_base(wanted)


def _checked_merged(wanted: ModelConfig, folder: Path) -> model.Base:
    model.find_base(ModelConfig(path=folder))
    if not probe.has_tokenizer(folder):
        fix = "write it there: AutoTokenizer.from_pretrained(BASE).save_pretrained(DIR)"
        raise ModelError(f"{folder} holds no tokenizer (tokenizer.json)", fix=fix)
    base = model.find_base(wanted)
    report = checks.Report(folder)
    report.run(lambda: probe.probe_merged(folder, base.folder))
    report.settle()
    return base


def _encoded(rows: list[Json], chat: ChatFormat) -> list[Json]:
    """The examples of prepared rows under another tokenizer or template."""
    whole = [row for row in rows if row["messages"]]
    made = chat.encode_many([tuple(map(Message.of, row["messages"])) for row in whole])
    found: list[Json] = []
    for row, examples in zip(whole, made, strict=True):
        for one in () if isinstance(examples, Refused) else examples:
            ids = {"input_ids": one.input_ids, "labels": one.labels}
            last = one is examples[-1]
            found.append(row | ids | {"messages": row["messages"] if last else None})
    if lacking := sum(isinstance(examples, Refused) for examples in made):
        warn(f"{lacking} rows cannot be written by this base's chat template: they are not asked")
    return found
