"""General ability: the adapter must not be worse than its base, by lm-eval-harness.

Non-inferiority, not significance: learning finance costs a little of everything else (Biderman et
al. 2024, arXiv 2405.09673), and the question is whether it can be more than a margin.
"""

from pathlib import Path
from typing import Any

from fintune.config import EvalConfig
from fintune.errors import ConfigError
from fintune.evals import stats

MARGIN, MEAN_MARGIN = 0.03, 0.015
"""A task passes while its lower 95 % bound is not under -3 points; the mean of all, -1.5 points."""
QUESTIONS = 200
"""Most questions of each task."""
METRICS = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")
"""Per-question scores that a task may report; the first it has is compared."""


def scores(peft_model: Any, tokenizer: Any, config: EvalConfig) -> dict[str, dict[str, float]]:
    """Score of every question by task and question, of the model as it is (adapter on or off).

    Raises:
        ConfigError: the `lm_eval` package is missing, or a task is unknown or has no such score.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "eval.regression needs lm-eval-harness, which is not installed",
            fix="pip install 'fintune[regression]', or leave eval.regression empty",
        ) from None
    files = [Path(name) for name in config.regression if name.endswith(".yaml")]
    tasks = [name for name in config.regression if not name.endswith(".yaml")]
    tasks += [file.stem for file in files]
    manager = TaskManager(include_path=[str(file.parent) for file in files])
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(f"eval.regression: lm-eval knows no task {', '.join(unknown)}")
    model = HFLM(
        pretrained=peft_model.get_base_model(),
        tokenizer=tokenizer,
        batch_size=config.per_device_eval_batch_size,
    )
    ran = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        limit=QUESTIONS,
        bootstrap_iters=0,
        apply_chat_template=True,
        log_samples=True,
    )
    found: dict[str, dict[str, float]] = {}
    for task, samples in ran["samples"].items():
        metric = next((name for name in METRICS if samples and name in samples[0]), None)
        if metric is None:
            raise ConfigError(f"eval.regression: {task} reports none of {', '.join(METRICS)}")
        kept = samples[0].get("filter")
        found[task] = {
            str(sample["doc_id"]): float(sample[metric])
            for sample in samples
            if sample.get("filter") == kept
        }
    return found


def summary(
    base: dict[str, dict[str, float]], adapter: dict[str, dict[str, float]], seed: int
) -> dict[str, Any]:
    """Differences by task with their lower bounds, and whether all keep within the margins."""
    tasks: dict[str, Any] = {}
    every: list[float] = []
    names: list[str] = []
    for task, scored in base.items():
        change = [adapter[task][question] - score for question, score in scored.items()]
        every += change
        names += [f"{task}/{question}" for question in scored]
        found = stats.paired(change, seed=seed)
        tasks[task] = {
            "base": round(sum(scored.values()) / len(scored), 6),
            "adapter": round(sum(adapter[task].values()) / len(scored), 6),
            "difference": found,
            "pass": found["ci95"][0] >= -MARGIN,
        }
    mean = stats.paired(every, names, seed=seed)
    kept = mean["ci95"][0] >= -MEAN_MARGIN
    return {
        "tasks": tasks,
        "mean": {"difference": mean, "pass": kept},
        "pass": kept and all(task["pass"] for task in tasks.values()),
    }
