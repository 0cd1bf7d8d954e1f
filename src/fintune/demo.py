"""What `fintune demo` shows after its run: three questions, base and adapter side by side."""

from fintune import console
from fintune.config import Config
from fintune.evals.grading import VARIANTS
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
    for question in DEMO_QUESTIONS:
        ids = loaded.chat.prompt_ids([Message("user", question)])
        asked = [Request(name, ids, TOKENS, adapter=name == "adapter") for name in VARIANTS]
        list(generate(loaded.model, loaded.chat, asked, batch_size=2))
        answers = "".join(f"\n  {request.id:7}  {request.text}" for request in asked)
        console.result(f"\n{question}{answers}")
    console.result(f"report   {config.eval_dir / 'report.html'}")
    console.result(f"release  {config.release_dir}")
