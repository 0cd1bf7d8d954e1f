"""Golden prompts (`prompt_fixture.json`), and `verify`, the check of any release folder.

Golden prompts are conversations with their prompt, ids, labels and greedy answers as in training.
Servers render different prompts for the same base (a second BOS, a missing date, another template),
which the adapter was not trained on; comparing a server's prompts with these shows it.

The stages of `verify`, in order: bytes (`untrusted.static`; nothing is loaded unless all of that
passed); tokenizer, golden prompts, keys and shapes in a limited child (`untrusted.probe`); the
recorded greedy answers against the weights; on request the prompts of a running server.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fintune import model
from fintune.chat import ChatFormat
from fintune.errors import FintuneError, ModelError, OutputError
from fintune.example import Message
from fintune.files import read_json
from fintune.generation import Request, generate
from fintune.untrusted import static
from fintune.untrusted.checks import FIXTURE, Check, Report, read_object
from fintune.untrusted.probe import read_tokenizer

KEY_VARIABLE = "FINTUNE_API_KEY"
TIMEOUT_S = 120.0
MAX_BYTES = 4 << 20
"""Bytes read of a server's answer."""
FORMAT = 3
"""Of the file of golden prompts; 3 holds the base's answers beside the adapter's."""
CANDIDATES = 8
"""Held-out questions that are tried for what the golden prompts leave undecided."""
OTHER_DATE = "19 Nov 2031"
VARIANTS = {"answer": True, "base_answer": False}
"""Key of a recorded answer -> whether the adapter gave it."""
ANSWER_TOKENS = 24
"""Tokens of a recorded answer: enough to tell two prompts apart, few enough for a laptop."""
ATOL = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.1}
"""Largest difference of a log-probability (nats) that the rounding of a precision explains."""
MEAN_SHARE = 0.2
"""Share of `ATOL` that the mean difference may reach: rounding is large at a few tokens, wrong
weights differ at all tokens, also where a release states a coarse precision."""

CONTROL = "control"
"""The golden prompt whose user's text spells control tokens: plain characters here, while a server
that tokenises the rendered prompt reads them as control tokens. Reported, never a failure."""
CONVERSATIONS: dict[str, list[Message]] = {
    name: [Message(**turn) for turn in turns]
    for name, turns in read_json(Path(__file__).with_name("golden_prompts.json")).items()
}


def make_golden_prompts(
    loaded: model.LoadedRelease, held_out: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The golden prompts of a template and tokenizer, with greedy answers of adapter and base.

    To the conversations of every release come held-out ones as long as a wrong prompt, one of
    another date or with a second BOS, would get each recorded answer all the same: `tells` names
    those whose answer it would change, so that a server that shows no ids can be checked.

    Args:
        held_out: questions with their reference answers.
    """
    more = {f"held out {at}": pair for at, pair in enumerate(held_out[:CANDIDATES], start=1)}
    candidates = CONVERSATIONS | {
        name: [Message("user", question), Message("assistant", answer)]
        for name, (question, answer) in more.items()
    }
    rows, tells = [], dict[str, list[str]]()
    for name, messages in candidates.items():
        row = _recorded(loaded, name, messages)
        told = _told(loaded, messages, row["answer"]["ids"])
        if name in CONVERSATIONS or any(told[wrong] and not tells[wrong] for wrong in told):
            rows.append(row)
            for wrong, changes in told.items():
                tells.setdefault(wrong, []).extend([name] * changes)
    chat = loaded.chat
    return {
        "format": FORMAT,
        "tells": tells,
        "template_sha256": chat.template_sha256,
        "chat": chat.template.record,
        "end_token_ids": chat.stop_token_ids,
        "decoding": {"greedy": True, "max_new_tokens": ANSWER_TOKENS, "dtype": loaded.dtype},
        "conversations": rows,
    }


def _recorded(loaded: model.LoadedRelease, name: str, messages: list[Message]) -> dict[str, Any]:
    """A conversation with the greedy answers of adapter and base to its prompt."""
    recorded = loaded.chat.recorded(messages)
    ids = recorded["prompt_ids"]
    for key, adapter in VARIANTS.items():
        request = Request(name, ids, ANSWER_TOKENS, adapter=adapter)
        list(generate(loaded.model, loaded.chat, [request], batch_size=1))
        with model.adapter_set(loaded.model, adapter):
            logprobs, _ = _likelihood(loaded.model, ids, request.token_ids)
        recorded[key] = {
            "ids": request.token_ids,
            "logprobs": [round(value, 4) for value in logprobs.tolist()],
            "text": loaded.chat.tokenizer.decode(request.token_ids, skip_special_tokens=True),
        }
    return {"name": name, **recorded}


def _told(
    loaded: model.LoadedRelease, messages: list[Message], answer: list[int]
) -> dict[str, bool]:
    """For each wrong prompt that a server may send, whether the adapter would answer otherwise.

    It does where a token of its answer is less likely than the best by more than rounding explains.
    """
    chat, wrong = loaded.chat, dict[str, list[int]]()
    other = chat.settings.model_copy(update={"date_string": OTHER_DATE})
    dated = ChatFormat(chat.tokenizer, other, chat.stop_token_ids).prompt_ids(messages)
    ids = chat.prompt_ids(messages)
    if dated != ids:
        wrong["date"] = dated
    if chat.tokenizer.bos_token_id is not None:
        wrong["second BOS"] = [chat.tokenizer.bos_token_id, *ids]
    told = {}
    for name, prompt in wrong.items():
        logprobs, best = _likelihood(loaded.model, prompt, answer)
        told[name] = float((best - logprobs).max()) > 2 * ATOL[loaded.dtype]
    return told


def verify(
    folder: Path, *, base: Path | None = None, no_pickle: bool = False, server: str | None = None
) -> Report:
    """Check a release folder, up to the first stage that fails.

    Args:
        folder: the release, or the hub id of one (`model.find_release`).
        base: folder or GGUF file of its base; absent: as `model.release_base` finds it.
        no_pickle: also refuse `training_args.bin`, which is otherwise allowed by name and
            checksum and never opened.
        server: URL of a running OpenAI-compatible server that serves this release.

    Returns:
        Every check that ran; `Report.settle` raises GateRefused where one failed.

    Raises:
        OutputError: no such folder.
        GateRefused: the base is refused, or the release passed a limit of the child.
        ModelError: the base is not on this machine and cannot be fetched, or the server does not
            answer.
    """
    report, folder = Report(folder), model.find_release(folder)
    if not folder.is_dir():
        raise OutputError(f"no release folder at {folder}")
    report.run(lambda: static.static_checks(folder, "release", no_pickle=no_pickle))
    report.run(lambda: [static.check_paths(folder, [])])
    if report.failed:
        return report
    base_model = model.release_base(folder, base)
    report.run(lambda: model.check_on_base(folder, base_model))
    report.run(lambda: _check_loaded(folder, base_model))
    if server is not None:
        report.run(lambda: _check_server(folder, server))
    return report


def _check_loaded(folder: Path, base: model.Base) -> Iterator[Check]:
    dtype = model.inference_dtype()
    try:
        peft_model = model.load_adapter(model.load_base(base, "none", dtype), folder)
    except FintuneError as error:
        yield Check("load", "failed", error.what)
        return
    yield Check("load", "ok", f"peft loads it on {base.about} ({dtype})")
    if golden := read_object(folder, FIXTURE, absent=True):
        yield check_answers(golden, peft_model, dtype)


def check_answers(golden: dict[str, Any], peft_model: Any, dtype: str) -> Check:
    """Each recorded greedy token is still the most likely one, as likely as it was, up to rounding:
    those of the adapter, and with it switched off those of the base.

    One forward pass a conversation over prompt and recorded answer, compared position by position
    within `ATOL` of the coarser precision. Likelihoods are compared too: weights that overflow give
    equal logits everywhere, and then any token is a most likely one.
    """
    atol = max(ATOL[dtype], ATOL[golden["decoding"]["dtype"]])
    differences = []
    for row, (key, adapter) in product(golden["conversations"], VARIANTS.items()):
        answer = row[key]
        with model.adapter_set(peft_model, adapter):
            logprobs, best = _likelihood(peft_model, row["prompt_ids"], answer["ids"])
        gaps = (best - logprobs).maximum((logprobs - torch.tensor(answer["logprobs"])).abs())
        # NaN compares false with everything, so ask whether all are within, not whether any is out.
        if not bool((gaps <= atol).all()):
            at = int((~(gaps <= atol)).nonzero()[0])
            whose = f"{row['name']}{'' if adapter else ', the base'}"
            return Check("answers", "failed", f"{whose}: another answer from token {at + 1}")
        differences.append(gaps)
    every = torch.cat(differences)
    mean, limit = float(every.mean()), MEAN_SHARE * atol
    if mean > limit:
        said = f"log-probabilities differ by {mean:.1e} in the mean (limit {limit:.1e})"
        return Check("answers", "failed", said)
    gaps_said = f"largest gap {float(every.max()):.1e}, mean {mean:.1e}"
    return Check("answers", "ok", f"{len(every)} greedy tokens reproduced ({gaps_said})")


def _likelihood(model: Any, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token, and that of the most likely token there; [answer]."""
    ids = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().cpu()
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0], logprobs.max(-1).values


def _check_server(folder: Path, url: str) -> Iterator[Check]:
    """The server's prompts are the golden ones: by ids where it shows them.

    Equal numbers of tokens alone decide nothing, since another prompt may have the same length.
    """
    golden = read_object(folder, FIXTURE, absent=True)
    if not golden:
        raise ModelError(f"{folder} has no {FIXTURE} to hold a server against")
    server, tokenizer = _Server(url, ["adapter", folder.resolve().name]), read_tokenizer(folder)
    rows, shown, differing = golden["conversations"], True, dict[str, str]()
    for row in rows:
        name, expected = row["name"], row["prompt_ids"]
        ids, count = server.prompt(row["messages"][:-1], tokenizer)
        shown = shown and ids is not None
        if count != len(expected) or ids not in (None, expected):
            differing[name] = f"{name} ({count - len(expected):+} tokens)"
    how = "are changed" if differing.pop(CONTROL, "") else "stay text"
    compared = f"in {sum(row['name'] != CONTROL for row in rows)} conversations"
    if differing:
        said = f"different: other prompts in {', '.join(differing.values())}"
        yield Check("server", "failed", said)
    elif shown:
        yield Check("server", "ok", f"equal: the same ids {compared}")
    else:
        said = f"undecided: the same number of prompt tokens {compared}, and no ids are shown there"
        yield Check("server", "failed", f"{said}; /tokenize or /apply-template would show them")
    yield Check("server", "note", f"control tokens in a user's text {how} there")


class _Server:
    """The few requests that are sent to an OpenAI-compatible server."""

    def __init__(self, url: str, names: list[str]) -> None:
        """Choose a model.

        Args:
            url: address of the server, with or without /v1.
            names: of the models to look for, best first; else its only one.

        Raises:
            ModelError: no server there, or none of the models.
        """
        self._url, self._model = url.rstrip("/").removesuffix("/v1"), ""
        served = [str(row["id"]) for row in self._ask("/v1/models", None).get("data", [])]
        chosen = [name for name in names if name in served] or (served if len(served) == 1 else [])
        if not chosen:
            what = f"{url} lists {', '.join(served) or 'no models'}, none called"
            fix = "serve the adapter under the name of its release folder, OpenAI-compatible"
            raise ModelError(f"{what} {' or '.join(names)}", fix=fix)
        self._model = chosen[0]

    def prompt(self, messages: Any, tokenizer: Any) -> tuple[list[int] | None, int]:
        """Ids of a conversation's prompt, None where the server shows none, and their number."""
        ids = self._ask("/tokenize", {"messages": messages}).get("tokens")
        if not ids and (text := self._ask("/apply-template", {"messages": messages}).get("prompt")):
            ids = tokenizer.encode(text, add_special_tokens=False)
            # llama.cpp leaves BOS out of the text that it shows and adds it when it tokenises.
            bos = tokenizer.bos_token_id
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        if ids:
            return ids, len(ids)
        body = {"messages": messages, "max_tokens": 1, "temperature": 0}
        usage = self._ask("/v1/chat/completions", body).get("usage") or {}
        if not (count := usage.get("prompt_tokens")):
            raise ModelError(f"{self._url} does not count prompt tokens")
        return None, int(count)

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object of an answer; empty where the server refuses or does not have it."""
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps({"model": self._model, **body}).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                tree = json.loads(response.read(MAX_BYTES))
                return tree if isinstance(tree, dict) else {}
        except urllib.error.HTTPError as error:
            if error.code not in {401, 403}:
                return {}
            refused = f"{self._url} refused the key"
            raise ModelError(refused, fix=f"set {KEY_VARIABLE}") from None
        except (OSError, ValueError) as error:
            what = f"no answer from {self._url}{path} ({type(error).__name__})"
            raise ModelError(what, fix="start the server, or check the address") from None
