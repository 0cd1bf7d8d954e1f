"""A running OpenAI-compatible server, held against the golden prompts of a release: it asks the
model the same prompts, and the adapter is the one that answers.

Nothing here imports torch, so that a wrong address is told before anything is loaded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fintune.errors import ModelError
from fintune.server_client import Refused, Server
from fintune.untrusted.checks import FIXTURE, Check

CONTROL = "control"
"""The golden prompt whose user's text spells control tokens: plain characters here, while a server
that tokenises the rendered prompt reads them as control tokens. Reported, never a failure."""
WRONG = {
    "base": "the same as the base: the base is served under the adapter's name {model}",
    "other": "another adapter, or weights coarser than 8 bits: the answers of {model} are neither"
    " the adapter's nor the base's",
    "undecided": "undecided: nothing shows whether {model} is the adapter or the base",
}


class ReleaseServer(Server):
    """The server of a release.

    Attributes:
        adapter: the model that is asked; empty where the server lists none.
        base: the model that should be the base; empty where none is listed as such.
    """

    def __init__(self, url: str, release: Path) -> None:
        """Ask for its models and choose: `adapter`, or the name of the release's folder, else the
        only one; as the base `base`, or what vLLM names as the adapter's parent.

        Raises:
            ConfigError: `url` is no address.
            ModelError: no server there, or none of the models.
        """
        super().__init__(url)
        names, served = ["adapter", release.resolve().name], [*self.models]
        chosen = [name for name in names if name in served] or (served if len(served) == 1 else [])
        if self.lists and not chosen:
            raise ModelError(
                f"{url} lists {', '.join(served) or 'no models'}, none called {' or '.join(names)}",
                fix="serve the adapter under the name of its release folder, OpenAI-compatible",
            )
        self.adapter = chosen[0] if chosen else ""
        parent = self.models.get(self.adapter, {}).get("parent")
        self.base = next((name for name in ("base", parent) if name in served), "")

    def prompt(self, messages: Any, tokenizer: Any) -> tuple[list[int] | None, int]:
        """Ids of a conversation's prompt, None where the server shows none, and their number.

        Raises:
            ModelError: no such answer, or it does not count its prompt's tokens.
        """
        asked = {"messages": messages} | ({"model": self.adapter} if self.adapter else {})
        ids = self.ask("/tokenize", asked, needed=False).get("tokens")
        text = "" if ids else self.ask("/apply-template", asked, needed=False).get("prompt")
        if text and isinstance(text, str):
            ids = tokenizer.encode(text, add_special_tokens=False)
            # llama.cpp leaves BOS out of the text that it shows and adds it when it tokenises.
            bos = tokenizer.bos_token_id
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        if ids and isinstance(ids, list):
            return ids, len(ids)
        body = asked | {"max_tokens": 1, "temperature": 0}
        usage = self.ask("/v1/chat/completions", body).get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(count, int):
            raise ModelError(f"{self.url} does not count prompt tokens")
        return None, count


def check_server(server: ReleaseServer, golden: dict[str, Any], tokenizer: Any) -> Iterator[Check]:
    """The server's prompts are the golden ones, by ids where it shows them, and so are the answers
    that it gives them under the names of the adapter and of the base.

    Equal numbers of tokens alone decide nothing, since another prompt may have the same length.

    Args:
        golden: the golden prompts of the release.
        tokenizer: of the release.
    """
    if not golden:
        raise ModelError(f"the release has no {FIXTURE} to hold a server against")
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
        said += "; an address that answers /tokenize or /apply-template would decide it: the one"
        yield Check("server", "failed", f"{said} behind a proxy, or that of another kind of server")
    yield Check("server", "note", f"control tokens in a user's text {how} there")
    yield from check_models(server, rows, tokenizer)


def check_models(
    server: ReleaseServer, rows: list[dict[str, Any]], tokenizer: Any
) -> Iterator[Check]:
    """The model of the adapter's name gives the adapter's recorded answers, and that of the base's
    name, where the server has one, does not."""
    decode = lambda token: str(tokenizer.decode([token]))  # noqa: E731
    names = {"adapter": server.adapter} | ({"base": server.base} if server.base else {})
    for expected, model in names.items():
        try:
            found, evidence = server.whose(model, rows, decode)
        except Refused as error:
            said = "undecided: whether the adapter is applied is asked with token ids; "
            yield Check("server", "failed", said + error.what)
            return
        model = model or "(unnamed)"
        if found == expected:
            yield Check("server", "ok", f"{model} answers as the {expected}: {evidence}")
        elif expected == "adapter":
            said = WRONG[found].format(model=model)
            yield Check("server", "failed", f"{said} ({evidence})")
        elif found == "adapter":
            said = f"{model}, the base's name, answers as the adapter"
            yield Check("server", "failed", f"{said} ({evidence})")
        else:
            said = f"{model} does not answer as the recorded base: {evidence}"
            yield Check("server", "note", said)
