"""What only transformers and peft can say of a folder: asked in the limited child, never here.

Tokenizers carry regular expressions, templates are programs, an adapter's target modules are
patterns and a configuration names sizes: each is tried once on the meta device or on short texts.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fintune.chat import ChatFormat
from fintune.errors import FintuneError, GateRefused, ModelError
from fintune.example import Message
from fintune.untrusted import checks
from fintune.untrusted.checks import Check, Unreadable
from fintune.untrusted.child import run_limited

_LOADING = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
"""What transformers raises for a folder that it cannot load."""
_RUN = 400
"""Characters of a repeated text: one that makes a pattern of nested repetitions explode."""
_PROBES = [character * _RUN + "\n!" for character in "aA1 .,-\t\n_(é中"] + [
    "Net loss (€1,234.5m) vs. £0.9bn, −3.4 %, 25 bps, ¥10兆 – café?" * 8
]
_TURNS = [
    {"role": "system", "content": "You are a financial analyst."},
    {"role": "user", "content": "What is EBITDA?"},
    {"role": "assistant", "content": "Earnings before interest, taxes, depreciation."},
    {"role": "user", "content": "And its margin?"},
    {"role": "assistant", "content": "EBITDA divided by revenue."},
]


def probe_base(folder: Path, *, weights: bool) -> None:
    """Try a base's configuration, tokenizer and chat template.

    Args:
        weights: the weights are used too: an empty model of this configuration is built.

    Raises:
        GateRefused: it needs code of its own, or passes a limit of the child.
        ModelError: the tokenizer does not load.
    """
    _import_architecture(folder)
    run_limited(lambda: _try_base(folder, weights), folder.name)


def probe_release(folder: Path, base: Path) -> list[Check]:
    """Try an adapter's tokenizer, template, golden prompts and tensors against its base.

    Raises:
        GateRefused: it passes a limit of the child.
    """
    _import_architecture(base)
    rows = run_limited(lambda: [*_release_rows(folder, base)], folder.name)
    return [Check(*row) for row in rows]


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, as the seed's usage snippet loads it; no code of it runs.

    Raises:
        GateRefused: it needs code of its own.
        ModelError: it does not load.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _LOADING as error:
        raise _unusable(f"the tokenizer in {folder}", error) from None


def read_architecture(folder: Path) -> Any:
    """A base's configuration, of a class that transformers itself has.

    Raises:
        GateRefused: it needs code of its own.
        ModelError: transformers does not know it, or it does not fit its class.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _LOADING as error:
        raise _unusable(f"config.json of {folder}", error) from None


def _unusable(what: str, error: Exception) -> FintuneError:
    if "trust_remote_code" in str(error):  # how transformers says that it lacks the class
        return GateRefused(
            f"{what} asks to run code of its own (auto_map)",
            why="a model folder is data here; code found in one is never run",
            fix="use a base whose architecture transformers itself has",
        )
    return ModelError(
        f"{what} does not load: {str(error)[:200]}",
        fix="compare the folder with its source, or use another base",
    )


def _import_architecture(folder: Path) -> None:
    """Import transformers' module of an architecture before the fork, so that it is paid once."""
    with suppress(Unreadable, KeyError, ImportError):
        name = checks.read_object(folder, "config.json")["model_type"]
        MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[name], None)


def _try_base(folder: Path, weights: bool) -> None:
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    architecture = read_architecture(folder)
    if weights:
        _empty_model(architecture)
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        _try_tokenizer(read_tokenizer(folder))


def _try_tokenizer(tokenizer: Any) -> None:
    """Encode texts that make patterns explode; render turns, with and without a system text."""
    for text in _PROBES:
        tokenizer(text)
    if tokenizer.chat_template:
        for rows in (_TURNS, _TURNS[1:], _TURNS[1:2]):
            with suppress(jinja2.TemplateError, TypeError, ValueError, KeyError):
                tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)


def _empty_model(architecture: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)


def _release_rows(folder: Path, base: Path) -> Iterator[tuple[str, str, str]]:
    for check in _release_checks(folder, base):
        yield check.name, check.status, check.detail


def _release_checks(folder: Path, base: Path) -> Iterator[Check]:
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    try:
        tokenizer = read_tokenizer(folder)
        _try_tokenizer(tokenizer)
    except ModelError as error:
        yield Check("tokenizer", "failed", error.what)
        return
    yield _check_special_tokens(folder, tokenizer)
    fixture = (folder / checks.FIXTURE).exists()
    if fixture:
        yield from _check_fixture(folder, base, tokenizer)
    else:
        yield Check("fixture", "note", "no prompt_fixture.json: prompts unproved")
    yield _check_tensors(folder, base)


def _check_special_tokens(folder: Path, tokenizer: Any) -> Check:
    """Both files that name special tokens say what the tokenizer does.

    transformers lets special_tokens_map.json win; other loaders read tokenizer_config.json alone.
    A release of ours names each token in both; in other folders one may be silent.
    """
    ours = (folder / checks.FIXTURE).exists()
    problems = []
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        tree = checks.read_object(folder, name) if (folder / name).exists() else {}
        for key, value in sorted(tokenizer.special_tokens_map.items()):
            named = tree.get(key)
            if (named is not None or ours) and _content(named) != _content(value):
                problems.append(f"{key} of {name} is {named!r:.80}")
    good = f"{len(tokenizer)} tokens, special tokens agree"
    return Check.of("tokenizer", checks.some(problems), good)


def _check_fixture(folder: Path, base: Path, tokenizer: Any) -> Iterator[Check]:
    """Tokenizer and stop tokens are the base's; golden prompts render as they were trained."""
    fixture = checks.read_object(folder, checks.FIXTURE)
    yield _check_same_tokenizer(tokenizer, base)
    stops, recorded = stop_token_ids(base, tokenizer), sorted(fixture["end_token_ids"])
    other = f"stop tokens are {stops}, the adapter was trained with {recorded}"
    yield Check.of("stop tokens", other if stops != recorded else "", f"{recorded}")
    try:
        yield check_fixture(fixture, ChatFormat(tokenizer, fixture["date_string"]), stops)
    except (FintuneError, jinja2.TemplateError, KeyError, TypeError, IndexError) as error:
        yield Check("fixture", "failed", f"unusable: {str(error)[:200]}")


def _check_same_tokenizer(tokenizer: Any, base: Path) -> Check:
    original = read_tokenizer(base)
    for each in (tokenizer, original):
        each.backend_tokenizer.no_padding()
        each.backend_tokenizer.no_truncation()
    names = ("bos_token", "eos_token")
    differing = [name for name in names if getattr(tokenizer, name) != getattr(original, name)]
    if tokenizer.backend_tokenizer.to_str() != original.backend_tokenizer.to_str():
        differing.append("tokenizer.json")
    problem = f"not the base's: {', '.join(differing)}" if differing else ""
    return Check.of("tokenizer", problem, "the base's own")


def check_fixture(fixture: dict[str, Any], chat: ChatFormat, stops: list[int]) -> Check:
    """Every conversation renders to the same text, ids and labels as when it was trained."""
    if chat.template_sha256 != fixture["template_sha256"]:
        return Check("fixture", "failed", "the chat template is not the one it was trained with")
    for row in fixture["conversations"]:
        messages = [Message(turn["role"], turn["content"]) for turn in row["messages"]]
        now = chat.recorded(messages)
        differing = [key for key, value in now.items() if value != row[key]]
        if differing:
            return Check("fixture", "failed", f"{row['name']}: other {', '.join(differing)}")
        if not {*row["labels"]} & {*stops}:
            return Check("fixture", "failed", f"{row['name']}: no stop token was trained")
        ids, logprobs = row["answer"]["ids"], row["answer"]["logprobs"]
        if len(ids) != len(logprobs) or max(ids) >= len(chat.tokenizer):
            return Check("fixture", "failed", f"{row['name']}: an answer that no model gave")
    return Check("fixture", "ok", f"{len(fixture['conversations'])} conversations, same ids")


def _check_tensors(folder: Path, base: Path) -> Check:
    """The adapter's tensors have peft's own names and shapes for this base."""
    try:
        model = _empty_model(read_architecture(base))
        peft = get_peft_model(model, LoraConfig.from_pretrained(folder), low_cpu_mem_usage=True)
        state = get_peft_model_state_dict(peft, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError) as error:
        return Check("keys", "failed", f"peft cannot place it on {base.name}: {str(error)[:200]}")
    expected = {name: tuple(value.shape) for name, value in state.items()}
    found = {n: tensor.shape for n, tensor in checks.read_header(folder, checks.ADAPTER).items()}
    problems = [f"missing key {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"extra key {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {found[name]}, the base needs {shape}"
        for name, shape in sorted(expected.items())
        if found.get(name, shape) != shape
    ]
    good = f"{len(expected)} keys and shapes as the base needs them"
    return Check.of("keys", checks.some(problems), good)


def stop_token_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the generation_config's list and the tokenizer's own.

    Args:
        folder: of the base.
    """
    name = "generation_config.json"
    config = checks.read_object(folder, name) if (folder / name).exists() else {}
    listed = config.get("eos_token_id") or []
    ids = set([listed] if isinstance(listed, int) else listed)
    return sorted(ids | ({tokenizer.eos_token_id} - {None}))


def _content(value: Any) -> Any:
    if isinstance(value, list):
        return [_content(part) for part in value]
    return value["content"] if isinstance(value, dict) and "content" in value else str(value)
