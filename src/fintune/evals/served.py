"""Answers of a running server (`eval.server`) in place of a model that is loaded here.

Prompts go as token ids, `eval.per_device_eval_batch_size` at once. An answer is yielded as soon as
it is there; after the first error nothing further is asked, and what was under way is kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fintune.chat import ChatFormat
from fintune.config import Config, ServerConfig
from fintune.console import meter, say, warn
from fintune.errors import ConfigError, GateRefused, ModelError
from fintune.evals.grading import VARIANTS
from fintune.evals.likelihood import Labelled
from fintune.example import IGNORE_INDEX
from fintune.files import JsonlLog, sha256_file, write_jsonl
from fintune.generation import Request
from fintune.server_client import LOGPROBS, Refused, Server, check_key
from fintune.untrusted.checks import ADAPTER, FIXTURE, read_object
from fintune.untrusted.probe import read_architecture

Json = dict[str, Any]
RETRIES = 5
REFUSES_ROW = (400, 413, 422, 501)
"""Statuses of a server that has no prompt_logprobs, or not of so long a row."""
PROMPTS, TOKENS = 8, 24
"""Of the check that base and adapter differ."""
SAME = 0.01
"""Mean difference (nats) of log-probabilities up to which two names are one model."""
CONTINUES = "run the same command again; what was answered is kept"


def find_models(asked: ServerConfig) -> dict[str, tuple[Server, str]]:
    """The server of each variant and the model's name there.

    Raises:
        ConfigError: as of `check_key`.
        ModelError: no server there, or it lacks one of the models.
    """
    urls = {"base": str(asked.base_url or asked.url), "adapter": str(asked.url)}
    for url in urls.values():
        check_key(url, "eval.server")
    servers = {url: Server(url, "eval.server") for url in {*urls.values()}}
    found = {}
    for variant, url in urls.items():
        name, listed = str(getattr(asked, variant)), [*servers[url].models]
        if len(servers) == 2 and len(listed) == 1:
            (name,) = listed
        if name not in listed:
            what = f"{url} lists {', '.join(listed) or 'no models'}, no {variant} called {name}"
            raise ModelError(what, fix="eval.server: {url: ..., base: NAME, adapter: NAME}")
        found[variant] = servers[url], name
    return found


class Served:
    """Base and adapter as two models of a server, or of two.

    Attributes:
        context: most tokens of prompt and answer, of the base and where a server says it.
        models: name of each; no address, because a release holds what is recorded.
        chat: the format of the prompts.
    """

    def __init__(self, config: Config, base: Path, adapter: Path, chat: ChatFormat) -> None:
        """Args: base, adapter: their folders. Raises ModelError as of `find_models`."""
        self.chat, self._variant = chat, "adapter"
        self._release, self._adapter = config.release_dir, adapter / ADAPTER
        self._at_once = config.eval.per_device_eval_batch_size
        self._of = find_models(config.eval.server)
        for server, _ in self._of.values():
            server.retries = RETRIES
        rows = [server.models[name] for server, name in self._of.values()]
        own = getattr(read_architecture(base).get_text_config(), "max_position_embeddings", 2**31)
        self.context = min(own, *(int(row.get("max_model_len") or own) for row in rows))
        self.models = {variant: name for variant, (_, name) in self._of.items()}

    @contextmanager
    def speaking(self, variant: str) -> Iterator["Served"]:
        """This, answering as a variant for as long as the block runs."""
        self._variant = variant
        yield self

    def measure(
        self, folder: Path, inputs: Json, rows: list[Json], prompts: list[list[int]]
    ) -> Json:
        """Prove both models, measure the held-out loss; the fields of run.json that say so.

        Args:
            inputs: of the evaluation.
            rows: whose loss is measured.
            prompts: of the questions.

        Raises:
            GateRefused: as of `prove`. ModelError: the server stops, or cuts a row.
        """
        known = {"models": self.models, "proof": self.prove(prompts)}
        packages = {"fintune": version("fintune")}
        facts = {**inputs, "server": known, "decoding": "greedy", "packages": packages}
        return {"provenance": facts, "loss_missing": self._measure_loss(folder, rows)}

    def prove(self, prompts: Sequence[Sequence[int]]) -> str:
        """Hold both models against the golden prompts of the run's release, or without one against
        each other; what was found.

        Raises:
            GateRefused: the adapter is not applied, or another model answers.
        """
        release, paths = self._release, (self._release / ADAPTER, self._adapter)
        same = all(map(Path.is_file, paths)) and len({*map(sha256_file, paths)}) == 1
        golden = read_object(release, FIXTURE, absent=True) if same else {}
        if not (rows := golden.get("conversations")):
            return self._differ([*prompts[:PROMPTS]])
        said, decode = [], lambda token: str(self.chat.tokenizer.decode([token]))
        for variant in VARIANTS:
            server, name = self._of[variant]
            found, evidence = server.whose(name, rows, decode)
            said.append(f"{self.models[variant]}: {evidence}")
            if found == "undecided":
                warn(f"nothing shows whether the {variant} answers: {said[-1]}")
            elif found != variant:
                other = "another model" if found == "other" else f"the {found}"
                what = f"under the {variant}'s name {other} answers: {said[-1]}"
                raise GateRefused(what, fix="see fintune verify --server, and the server's log")
        return "; ".join(said)

    def _differ(self, prompts: list[Sequence[int]]) -> str:
        heard = [
            [server.complete(name, ids, TOKENS, **LOGPROBS) for ids in prompts]
            for server, name in self._of.values()
        ]
        alike = all(a.text == b.text for a, b in zip(*heard, strict=True))
        steps = ([step.logprob for each in of for step in each.steps] for of in heard)
        gaps = [abs(a - b) for a, b in zip(*steps, strict=False)]
        said = f"base and adapter give the same answers on {len(prompts)} prompts"
        if alike and gaps and sum(gaps) / len(gaps) <= SAME:
            what = f"{said}, and the same log-probabilities: the adapter is not applied"
            raise GateRefused(what, fix="see the server's log for what it did with the adapter")
        if alike and not gaps:
            warn(f"{said}, and no log-probabilities are shown: the adapter may not be applied")
        return said if alike else f"base and adapter differ on {len(prompts)} prompts"

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Yield each request with its answer.

        Raises:
            ModelError: the server refuses, stops, cuts a prompt or an answer.
        """
        return self._each(partial(self._answered, self._variant), requests)

    def _answered(self, variant: str, request: Request) -> Request:
        (server, name), limit = self._of[variant], request.max_new_tokens
        found = server.complete(name, request.prompt_ids, limit, return_token_ids=True)
        tokenizer, stops = self.chat.tokenizer, self.chat.stop_token_ids
        ids = [*found.ids] or tokenizer.encode(found.text, add_special_tokens=False)
        end = next((at for at, token in enumerate(ids, 1) if token in stops), None)
        stopped = end is not None or found.finish_reason == "stop"
        if not stopped and found.ids and len(ids) < limit:
            what = f"{server.url} ended an answer after {len(ids)} of {limit} tokens"
            raise ModelError(what, fix="raise its limits, or lower eval.max_new_tokens")
        request.token_ids, request.finish_reason = ids[:end], "stop" if stopped else "length"
        request.text, request.in_thought = self.chat.answer(request.token_ids)
        return request

    def score(self, questions: Iterable[Labelled]) -> Iterator[list[tuple[Labelled, list[float]]]]:
        """Yield questions with the log-probability of each choice, in nats.

        Raises:
            ConfigError: the server has no prompt_logprobs.
        """
        return self._each(partial(self._scored, self._variant), questions)

    def _scored(self, variant: str, question: Labelled) -> tuple[Labelled, list[float]]:
        likely, start = [], len(question.prompt_ids) - 1
        for choice in question.choice_ids:
            known = self._logprobs(variant, [*question.prompt_ids, *choice])
            if not known:
                what = "eval.label_scoring=likelihood: the server gives no prompt_logprobs"
                raise ConfigError(what, fix="--set eval.label_scoring=generate")
            likely.append(sum(known[start:]))
        return question, likely

    def _logprobs(self, variant: str, ids: Sequence[int]) -> Sequence[float]:
        """Log-probability of each token but the first; empty where the server gives none."""
        server, name = self._of[variant]
        try:
            return server.complete(name, ids, 1, prompt_logprobs=1).prompt_logprobs
        except Refused as error:
            if error.status not in REFUSES_ROW:
                raise
            return ()

    def _measure_loss(self, folder: Path, rows: list[Json]) -> str:
        """Append each row's sums of the loss over label tokens, of base and adapter; why not, where
        the server gives no prompt_logprobs."""
        path = folder / "heldout.jsonl"
        with JsonlLog(path) as file, meter("held-out loss", len(rows)) as progress:
            if not rows:
                return "no row is held out"
            done = {cell["row"] for cell in file.rows()}
            shortest = min(rows, key=lambda row: len(row["input_ids"]))
            if not all(self._logprobs(name, shortest["input_ids"]) for name in VARIANTS):
                return "the server gives no prompt_logprobs"
            todo = [(at, row) for at, row in enumerate(rows) if at not in done]
            progress.advance(len(done))
            for cells in self._each(self._loss, todo):
                file.append(*(cell for cell in cells if cell))
                progress.advance(1)
            cells = sorted(file.rows(), key=lambda cell: int(cell["row"]))
        write_jsonl(path, cells)
        if len(cells) < len(rows):
            warn(f"held-out loss: {len(rows) - len(cells)} rows are longer than the server takes")
        return ""

    def _loss(self, asked: tuple[int, Json]) -> Json | None:
        at, row = asked
        labels = row["labels"][1:]
        cell = {"row": at, "source": row["source"], "rows": 1}
        cell["tokens"] = sum(label != IGNORE_INDEX for label in labels)
        for variant in VARIANTS:
            known = self._logprobs(variant, row["input_ids"])
            if not known:
                return None
            pairs = zip(known, labels, strict=True)
            cell[variant] = -sum(own for own, label in pairs if label != IGNORE_INDEX)
        return cell

    def _each(self, make: Callable[[Any], Any], asked: Iterable[Any]) -> Iterator[list[Any]]:
        errors = list[BaseException]()
        with ThreadPoolExecutor(self._at_once) as pool:
            futures = [pool.submit(make, each) for each in asked]
            try:
                for future in as_completed(futures):
                    if future.cancelled():
                        continue
                    if error := future.exception():
                        errors.append(error)
                        _break_off(futures)
                    else:
                        yield [future.result()]
            finally:
                _break_off(futures)
        if errors:
            say(CONTINUES)
            raise errors[0]


def _break_off(futures: list[Future[Any]]) -> None:
    for each in futures:
        each.cancel()
