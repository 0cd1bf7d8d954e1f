"""Checks that need transformers and peft, run in a forked child with limits.

Tokenizers contain regular expressions, templates are programs, an adapter's target modules are
patterns and a configuration states sizes: each is used once, on short texts or the meta device.
The child is forked after the imports, so that they are done once. It writes no file and reads no
terminal; where it dies, the folder is refused.
"""

import json
import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jinja2
import psutil
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText,
)

from fintune import errors, files
from fintune.chat import ChatFormat
from fintune.config import ChatConfig
from fintune.errors import FintuneError, GateRefused, ModelError
from fintune.example import Message
from fintune.untrusted import checks
from fintune.untrusted.checks import Check, Unreadable, ask, refuse

CPU_S = 20
"""Processor time of the child."""
CLOCK_S = 120
MEMORY = 2 * 2**30
"""Resident bytes beyond the parent's at the fork."""
_POLL_S = 0.02
_MOST_RESULT = 8 * 2**20
"""Largest result of the child in bytes."""
_LIMITS = f"{CPU_S} s of processor time, {CLOCK_S} s, {MEMORY >> 30} GB of memory, no file written"
_RUN = 400
"""Length of repeated characters, on which nested repetitions in a pattern backtrack for hours."""
_MOST_TOKENS = 4096
"""Most tokens of a recorded answer."""
_PROBES = [character * _RUN + "\n!" for character in "aA1 .,-\t\n_(é中"] + [
    "Net loss (€1,234.5m) vs. £0.9bn, −3.4 %, 25 bps, ¥10兆 – café?" * 8
]
_ROLES = ("system", "user", "assistant", "user", "assistant")
_TURNS = [{"role": role, "content": "What is EBITDA, and what is its margin?"} for role in _ROLES]


def probe_base(folder: Path, *, weights: bool) -> None:
    """Use a base's configuration, tokenizer and chat template once.

    Args:
        weights: also build a model without weights from the configuration.

    Raises:
        GateRefused: the base needs custom code, or exceeded a limit of the child.
        ModelError: the tokenizer does not load.
    """
    run_limited(lambda: _try_base(folder, weights), folder.name)


def probe_release(folder: Path, base: Path) -> list[Check]:
    """Check an adapter's tokenizer, template, golden prompts and tensors against its base.

    Raises:
        GateRefused: a limit of the child was exceeded.
    """
    of = _Release(folder, base)
    rows = run_limited(lambda: [astuple(check) for check in _release_checks(of)], folder.name)
    return [Check(*row) for row in rows]


def probe_merged(folder: Path, base: Path) -> list[Check]:
    """Whether a merged model has the token ids of its base. Raises GateRefused: a limit."""
    of = _Release(folder, base)
    rows = run_limited(lambda: [astuple(ask("token ids", _check_same_ids, of))], folder.name)
    return [Check(*row) for row in rows]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer; one of a plain peft adapter does not."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))


def own_template(folder: Path) -> str | None:
    """The chat template that a checked folder brings, if it brings one."""
    return read_tokenizer(folder).chat_template if has_tokenizer(folder) else None


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; no code of the folder runs.

    Raises:
        GateRefused: it needs custom code.
        ModelError: it does not load.
    """
    return _read(AutoTokenizer, folder, "the tokenizer in")


def read_architecture(folder: Path) -> Any:
    """A base's configuration, of a class that is part of transformers.

    Raises:
        GateRefused: it needs custom code.
        ModelError: transformers does not know it, or a field has a wrong type.
    """
    return _read(AutoConfig, folder, "config.json of")


def stop_token_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Ids of every token that ends an answer: `eos_token_id` of generation_config and tokenizer.

    Args:
        folder: of the base.
    """
    config = checks.read_object(folder, "generation_config.json", absent=True)
    listed = config.get("eos_token_id")
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id}
    return sorted(ids - {None})


def _read(kind: Any, folder: Path, what: str) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):  # how transformers says that it lacks the class
            what = f"{what} {folder} asks to run custom code (auto_map), which is never run"
            fix = "use a base whose architecture is part of transformers"
            raise GateRefused(what, fix=fix) from None
        raise ModelError(f"{what} {folder} does not load: {str(error)[:200]}") from None


def run_limited(work: Callable[[], Any], subject: str) -> Any:
    """Run `work` in a forked child with limits and return its result, which must be JSON.

    Args:
        subject: name of the folder in messages.

    Raises:
        GateRefused: the child raised, died or exceeded a limit.
        FintuneError: raised by `work`; the same class is raised here.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work_and_exit, args=(work, sender))
    memory = psutil.Process().memory_info().rss + MEMORY
    child.start()
    answer = dict[str, Any]()
    try:
        sender.close()
        while not receiver.poll(_POLL_S) and child.is_alive():
            with suppress(psutil.Error):
                if psutil.Process(child.pid).memory_info().rss > memory:
                    child.kill()
        with suppress(EOFError, OSError, ValueError):
            answer = json.loads(receiver.recv_bytes(_MOST_RESULT)) if receiver.poll() else {}
    finally:  # also where a signal was handled meanwhile
        receiver.close()
        child.kill()
        child.join()
    if "result" in answer:
        return answer["result"]
    if kind := getattr(errors, answer.pop("class", ""), None):
        raise kind(**answer)
    what = answer.get("what", f"reading it crashed or exceeded a limit ({_LIMITS})")
    raise GateRefused(f"{subject} is refused: {what}")


def _work_and_exit(work: Callable[[], Any], pipe: Connection) -> None:
    """The child: set its limits, work, write the result to the pipe, and exit."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(CLOCK_S)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    # A lock that the parent holds on an open file would outlive a kill of the parent.
    os.closerange(3, pipe.fileno())
    os.closerange(pipe.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    # Threads of OpenMP and of tokenizers did not survive the fork. Setting one thread where there
    # is one already fails in torch 2.13: its pool of one is not made again behind a fork.
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        answer: dict[str, Any] = {"result": work()}
    except FintuneError as error:
        answer = {"class": type(error).__name__, **vars(error)}
    except Exception as error:  # whatever transformers, peft or a template raise: refused
        answer = {"what": f"{type(error).__name__}: {str(error)[:300]}"}
    pipe.send_bytes(json.dumps(answer).encode())
    os._exit(0)


def _try_base(folder: Path, weights: bool) -> None:
    architecture = read_architecture(folder)
    if weights:
        empty_model(architecture)
    if has_tokenizer(folder):
        _try_tokenizer(read_tokenizer(folder))


def _try_tokenizer(tokenizer: Any) -> None:
    """Encode texts that slow patterns down; render turns, with and without a system message."""
    for text in _PROBES:
        tokenizer(text)
    if tokenizer.chat_template:
        for rows in (_TURNS, _TURNS[1:], _TURNS[1:2]):
            with suppress(jinja2.TemplateError, TypeError, ValueError, KeyError):
                tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)


def model_class(architecture: Any) -> Any:
    """The auto class of an architecture: causal, or of a multimodal model that has no other."""
    causal = type(architecture) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def empty_model(architecture: Any) -> Any:
    """A model of the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return model_class(architecture).from_config(architecture, trust_remote_code=False)


@dataclass(frozen=True)
class _Release:
    """The folders of an adapter and its base, and what several checks read from them."""

    folder: Path
    base: Path

    @cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.folder)

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format with the recorded settings."""
        if "chat" not in self.golden:
            raise Unreadable("made by an older version of fintune: release it again from its run")
        source = str(self.tokenizer.get_chat_template())
        if files.sha256_bytes(source.encode()) != self.golden["template_sha256"]:
            raise Unreadable("the chat template is not the one it was trained with")
        settings = ChatConfig(**self.golden["chat"]["settings"])
        return ChatFormat(self.tokenizer, settings, stop_token_ids(self.base, self.tokenizer))

    @cached_property
    def golden(self) -> dict[str, Any]:
        """prompt_fixture.json; empty where there is none."""
        return checks.read_object(self.folder, checks.FIXTURE, absent=True)


def _release_checks(of: _Release) -> Iterator[Check]:
    own = has_tokenizer(of.folder)
    if own or of.golden:
        yield ask("tokenizer", _check_special_tokens, of)
    else:
        yield Check("tokenizer", "note", "none here: its base's")
    if of.golden:
        yield ask("tokenizer", _check_same_tokenizer, of)
        yield ask("stop tokens", _check_stop_tokens, of)
        yield ask("fixture", _check_golden_prompts, of)
    else:
        if own:
            yield ask("token ids", _check_same_ids, of)
        yield Check("fixture", "note", f"no {checks.FIXTURE}: prompts not checked")
    yield ask("keys", _check_keys, of)


def _check_special_tokens(of: _Release) -> str:
    """The special tokens in each of the two files are those of the loaded tokenizer.

    In transformers special_tokens_map.json has precedence; other loaders read only
    tokenizer_config.json. Our releases state each token in both files, other folders need not.
    """
    _try_tokenizer(of.tokenizer)
    differing = []
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        tree = checks.read_object(of.folder, name, absent=True)
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            named, value = tree.get(key), getattr(of.tokenizer, key)
            text = named.get("content") if isinstance(named, dict) else named
            if text != value and (named is not None or of.golden):
                differing.append(f"{key} of {name} is {named!r:.80}")
    refuse("other special tokens:", differing)
    return f"{len(of.tokenizer)} tokens, special tokens agree"


def _check_same_tokenizer(of: _Release) -> str:
    if _identity(of.tokenizer) != _identity(read_tokenizer(of.base)):
        raise Unreadable("BOS, end of turn or tokenizer.json are not the base's")
    return "equals the base's"


def _check_same_ids(of: _Release) -> str:
    """The tokenizer gives the ids of the base's; tokens that it has besides do not matter."""
    tokenizers = of.tokenizer, read_tokenizer(of.base)
    _try_tokenizer(of.tokenizer)
    ids, wanted = ([t(x, add_special_tokens=False).input_ids for x in _PROBES] for t in tokenizers)
    if ids != wanted:
        raise Unreadable("its tokenizer gives other ids than its base's")
    return "as its base's"


def _identity(tokenizer: Any) -> tuple[str, str, str]:
    """BOS, end of turn and tokenizer.json without padding and truncation, which are settings."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer.bos_token, tokenizer.eos_token, tokenizer.backend_tokenizer.to_str()


def _check_stop_tokens(of: _Release) -> str:
    recorded = sorted(of.golden["end_token_ids"])
    if (stops := of.chat.stop_token_ids) != recorded:
        raise Unreadable(f"{stops}, the adapter was trained with {recorded}")
    return f"{recorded}"


def _check_golden_prompts(of: _Release) -> str:
    """Every conversation renders to the recorded text, ids and labels."""
    golden, rows = of.golden, of.golden.get("conversations", [])
    chat, words = of.chat, range(read_architecture(of.base).get_text_config().vocab_size)
    if golden["decoding"]["dtype"] not in ("fp32", "bf16", "fp16") or not 3 <= len(rows) <= 100:
        raise Unreadable("no recorded answers of a known precision")
    for row in rows:
        now = chat.recorded([Message.of(turn) for turn in row["messages"]])
        refuse(f"{row['name']}: other", [key for key, value in now.items() if value != row[key]])
        if not {*row["labels"]} & {*golden["end_token_ids"]}:
            raise Unreadable(f"{row['name']}: no stop token was trained")
        for answer in (row["answer"], row["base_answer"]):
            ids, logprobs = answer["ids"], answer["logprobs"]
            finite = [isinstance(number, float) and math.isfinite(number) for number in logprobs]
            whole = [type(token) is int and token in words for token in ids]
            if not 0 < len(ids) == len(logprobs) <= _MOST_TOKENS or not all(finite + whole):
                raise Unreadable(f"{row['name']}: ids or logprobs of the answer are not valid")
    return f"{len(rows)} conversations, same ids"


def _check_keys(of: _Release) -> str:
    """The adapter's tensors have the names and shapes that peft gives them on this base."""
    model = empty_model(read_architecture(of.base))
    peft = get_peft_model(model, LoraConfig.from_pretrained(of.folder), low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(peft, save_embedding_layers=False)
    needed = {name: tuple(value.shape) for name, value in state.items()}
    header = checks.read_header(of.folder, checks.ADAPTER)
    refuse("missing key", needed.keys() - header.keys())
    refuse("extra key", header.keys() - needed.keys())
    other = [name for name, shape in needed.items() if header[name][1] != shape]
    refuse("another shape than the base needs:", other)
    return f"{len(needed)} keys and shapes as the base needs them"
