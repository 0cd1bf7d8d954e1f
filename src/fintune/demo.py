"""What `fintune demo` shows after its run."""

from fintune import console, sample
from fintune.config import Config
from fintune.evals.grading import VARIANTS, Pair, load_pairs
from fintune.evals.stats import rate
from fintune.files import read_json

EXAMPLES = 3


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
    points = [f"{100 * end:+.1f}" for end in (gain["value"], *gain["ci95"])]
    console.result("gain {} points, paired 95 % interval {} to {}".format(*points))
    if control.get("trained_on") == results["provenance"]["base_about"]:
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
    passed = [pair.passes(variant, lambda g: g.correct) for pair in pairs]
    right = rate(passed, [pair.item.group for pair in pairs])
    low, high = right["ci95"]
    return f"{right['value']:.1%} ({low:.0%} to {high:.0%})"


def _examples(pairs: list[Pair]) -> list[Pair]:
    """The shortest question of each kind that the adapter alone answered right, amounts first."""
    won = [pair for pair in pairs if pair.better == "adapter"]
    won.sort(key=lambda pair: (pair.item.kind != "number", len(pair.item.messages[-1].content)))
    return list({pair.item.choices: pair for pair in reversed(won)}.values())[::-1][:EXAMPLES]
