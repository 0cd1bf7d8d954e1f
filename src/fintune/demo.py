"""What `fintune demo` shows after its run: three questions, base and adapter side by side."""

from fintune import console
from fintune.config import Config
from fintune.example import Message
from fintune.files import read_json
from fintune.generation import Request, generate
from fintune.model import LoadedRelease, find_base, load_release
from fintune.nano import DEMO_QUESTIONS

TOKENS = 48
"""Longest answer shown; the base does not know when to stop."""


def show(config: Config) -> None:
    """Print the verdict of a finished demo and answer three questions it was not trained on."""
    results = read_json(config.eval_dir / "test_results.json")
    accuracy, loss = results["accuracy"], results["loss"]
    gain, always = accuracy["difference"], accuracy["majority_class"]["value"]
    right = [f"{value:.1%}" for value in (accuracy["base"], accuracy["adapter"], always)]
    nats = [f"{loss['base']:.3f}", f"{loss['adapter']:.3f}", ""]
    console.table(
        f"held-out rows, {gain['n']} checkable questions: {results['verdict']}",
        ["", "base", "adapter", "always the commonest"],
        [["answers right", *right], ["loss (nats a token)", *nats]],
    )
    low, high = gain["ci95"]
    console.result(f"gain {gain['value']:+.1%}, paired 95 % interval {low:+.1%} to {high:+.1%}")
    # fp32, so that what is shown does not depend on how this CPU rounds bf16.
    loaded = load_release(config.release_dir, find_base(config.model), dtype="fp32")
    answers = _answers(loaded)
    for question in DEMO_QUESTIONS:
        base, adapter = (answers[f"{side} {question}"] for side in ("base", "adapter"))
        console.result(f"\n{question}\n  base     {base}\n  adapter  {adapter}")
    console.result(f"report   {config.eval_dir / 'report.html'}")
    console.result(f"release  {config.release_dir}")


def _answers(loaded: LoadedRelease) -> dict[str, str]:
    """The answers of base and adapter, by `base QUESTION` and `adapter QUESTION`."""
    requests = []
    for question in DEMO_QUESTIONS:
        ids = loaded.chat.prompt_ids([Message("user", question)])
        requests.append(Request(f"base {question}", ids, TOKENS, adapter=False))
        requests.append(Request(f"adapter {question}", ids, TOKENS))
    ends, tokenizer = loaded.stop_token_ids, loaded.chat.tokenizer
    size = len(requests)
    done = generate(loaded.model, tokenizer, requests, stop_token_ids=ends, batch_size=size)
    return {request.id: request.text for batch in done for request in batch}
