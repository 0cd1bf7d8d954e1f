"""What `fintune demo` shows after its run: three questions, base and adapter side by side."""

from fintune import console
from fintune.config import Config
from fintune.example import Message
from fintune.files import read_json
from fintune.generation import Request, generate
from fintune.model import find_base, load_release
from fintune.nano import DEMO_QUESTIONS

TOKENS = 48
"""Longest answer shown; the base does not know when to stop."""


def show(config: Config) -> None:
    """Print the verdict of a finished demo and answer three questions it was not trained on."""
    results = read_json(config.eval_dir / "test_results.json")
    accuracy, loss = results["accuracy"], results["loss"]
    difference, always = accuracy["difference"], accuracy["majority_class"]["value"]
    low, high = difference["ci95"]
    right = [f"{value:.1%}" for value in (accuracy["base"], accuracy["adapter"], always)]
    nats = [f"{loss['base']:.3f}", f"{loss['adapter']:.3f}", ""]
    console.table(
        f"held-out rows, {difference['n']} checkable questions: {results['verdict']}",
        ["", "base", "adapter", "always the commonest"],
        [["answers right", *right], ["loss (nats a token)", *nats]],
    )
    gain = f"{difference['value']:+.1%}, paired 95 % interval {low:+.1%} to {high:+.1%}"
    console.result(f"gain {gain}")
    for question, base, adapter in zip(DEMO_QUESTIONS, *_answers(config), strict=True):
        console.result(f"\n{question}\n  base     {base}\n  adapter  {adapter}")
    console.result(f"report   {config.eval_dir / 'report.html'}")
    console.result(f"release  {config.release_dir}")


def _answers(config: Config) -> tuple[list[str], list[str]]:
    """Of the base and of the adapter, in the order of the questions."""
    # fp32, so that what is shown does not depend on how this CPU rounds bf16.
    loaded = load_release(config.release_dir, find_base(config.model), dtype="fp32")
    chat = loaded.chat
    prompts = [chat.prompt_ids([Message("user", question)]) for question in DEMO_QUESTIONS]

    def answer() -> list[str]:
        requests = [Request(str(at), ids, TOKENS) for at, ids in enumerate(prompts)]
        ends = {"stop_token_ids": loaded.stop_token_ids}
        batches = generate(loaded.model, chat.tokenizer, requests, batch_size=len(requests), **ends)
        texts = {answer.id: answer.text for batch in batches for answer in batch}
        return [texts[request.id] for request in requests]

    with loaded.model.disable_adapter():
        plain = answer()
    return plain, answer()
