"""Golden prompts (`prompt_fixture.json`), and `verify`, the check of any release folder.

Golden prompts are conversations with their prompt, ids, labels and greedy answers as in training.
Servers render different prompts for the same base (a second BOS, a missing date, another template),
which the adapter was not trained on; comparing a server's prompts with these shows it.

The stages of `verify`, in order: bytes (`untrusted.static`; nothing is loaded unless all of that
passed); tokenizer, golden prompts, keys and shapes in a limited child (`untrusted.probe`); the
recorded greedy answers against the weights; on request the prompts of a running server
(`server_check`), whose address is asked before all that; last what was found of the adapter.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fintune import model
from fintune.chat import ChatFormat
from fintune.errors import FintuneError, OutputError
from fintune.example import Message
from fintune.files import read_json
from fintune.generation import Request, generate
from fintune.releasing.contents import standing
from fintune.releasing.server_check import ReleaseServer, check_server
from fintune.untrusted import static
from fintune.untrusted.checks import FIXTURE, Check, Report, read_object
from fintune.untrusted.probe import read_tokenizer

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
    folder: Path,
    *,
    base: Path | None = None,
    no_pickle: bool = False,
    server: str | None = None,
    require: str | None = None,
) -> Report:
    """Check a release folder, up to the first stage that fails.

    Args:
        folder: the release, or the hub id of one (`model.find_release`).
        base: folder or GGUF file of its base; absent: as `model.release_base` finds it.
        no_pickle: also refuse `training_args.bin`, which is otherwise allowed by name and
            checksum and never opened.
        server: URL of a running OpenAI-compatible server that serves this release.
        require: the verdict without which the release is refused.

    Returns:
        Every check that ran; `Report.settle` raises GateRefused where one failed.

    Raises:
        OutputError: no such folder.
        GateRefused: the base is refused, or the release passed a limit of the child.
        ConfigError: `server` is no address.
        ModelError: the base is not on this machine and cannot be fetched, or the server does not
            answer.
    """
    asked = ReleaseServer(server, folder) if server is not None else None
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
    if asked is not None:
        golden = read_object(folder, FIXTURE, absent=True)
        report.run(lambda: check_server(asked, golden, read_tokenizer(folder)))
    report.run(lambda: standing(folder, require))
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
