"""Evidence before release: what the three finished folders say of themselves and of each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fintune import files, seal
from fintune.config import Config, load_config
from fintune.errors import GateRefused
from fintune.model import Base, find_base
from fintune.untrusted import checks, static
from fintune.untrusted.checks import JUDGED, RESULTS


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a release is made of, read once."""

    config: Config
    recipe: Config
    base: Base
    seals: dict[str, dict[str, Any]]
    manifest: dict[str, Any]
    results: dict[str, Any]
    environment: dict[str, Any]
    provenance: dict[str, Any]


def read_inputs(config: Config, accept: str | None) -> Inputs:
    """Read the three finished folders; each seal says what it was made from."""
    adapter, evidence = f"best/{checks.ADAPTER}", (RESULTS, JUDGED)
    run, evaluation = config.run_dir, config.eval_dir
    seals = {
        "data": seal.read_data(config.data_dir),
        "run": seal.read_seal(run, stage="training run", make="fintune train", needed=[adapter]),
        "eval": seal.read_seal(
            evaluation, stage="evaluation", make="fintune eval", needed=evidence
        ),
    }
    results, judged = (seals["eval"]["files"][name] for name in evidence)
    environment, written = config.run_dir / "environment.json", config.run_dir / "config.yaml"
    return Inputs(
        config=config,
        recipe=load_config(written) if written.is_file() else config,
        base=find_base(config.model),
        seals=seals,
        manifest=files.read_json(config.data_dir / "manifest.json"),
        results=files.read_json(config.eval_dir / RESULTS),
        environment=files.read_json(environment) if environment.is_file() else {},
        provenance={
            "adapter_sha256": seals["run"]["files"][adapter]["sha256"],
            "manifest_sha256": seals["data"]["files"]["manifest.json"]["sha256"],
            "test_results_sha256": results["sha256"],
            "judged_sha256": judged["sha256"],
            "release": config.release.model_dump(mode="json", exclude={"out", "license_file"}),
            "accepted": accept,
        },
    )


def gate(inputs: Inputs, accept: str | None) -> None:
    """Refuse what evidence does not carry. Every reason is named, not only the first."""
    if accept is not None and not accept.strip():
        raise GateRefused("--accept needs a reason", why="the card prints it for every reader")
    best = inputs.config.run_dir / "best"
    reasons = _unaccountable(inputs)
    reasons += [check.detail for check in static.check_weights(best) if check.status == "failed"]
    verdict = inputs.results.get("verdict")
    if verdict != "better" and accept is None:
        reasons.insert(0, f"the verdict is {verdict!r}, not 'better'")
    if reasons:
        raise GateRefused(
            "not released: " + "; ".join(reasons),
            why="a release carries proof, or it is not made",
            fix='a verdict may be accepted with a reason: --accept "..." (the card prints it);'
            " for anything else train or evaluate again",
        )


def _unaccountable(inputs: Inputs) -> list[str]:
    """Where data, run and evaluation do not belong together, or leak into each other."""
    data, run, evaluation = (inputs.seals[name] for name in ("data", "run", "eval"))
    train = data["files"]["train.parquet"]["sha256"]
    claims = [
        (
            _at(run, "inputs", "data", "train.parquet"),
            train,
            "the run was trained on other data than data/train.parquet",
        ),
        (
            _at(run, "inputs", "base", "revision"),
            inputs.base.revision,
            "the run was trained on another revision of the base",
        ),
        (
            _at(evaluation, "inputs", "adapter"),
            inputs.provenance["adapter_sha256"],
            "the evaluation is of another adapter than run/best",
        ),
        (_at(evaluation, "inputs", "train"), train, "the evaluation knows other training rows"),
        (
            _at(evaluation, "inputs", "test"),
            data["files"]["test.parquet"]["sha256"],
            "the evaluation decided by other rows than data/test.parquet",
        ),
    ]
    reasons = [reason for claimed, found, reason in claims if claimed != found]
    if not reasons and (shared := _shared_groups(inputs.config.data_dir)):
        reasons.append(f"{shared} groups of the test rows are also in the training rows")
    flagged = _at(inputs.results, "n", "contaminated")
    if flagged != 0:
        reasons.append(f"contaminated rows in the test set: {flagged}")
    return reasons


def _shared_groups(data: Path) -> int:
    """Groups of related rows that are both trained on and decided by; 0 where split properly."""
    trained = set(pq.read_table(data / "train.parquet", columns=["group"])["group"].to_pylist())
    return len(trained.intersection(pq.read_table(data / "test.parquet")["group"].to_pylist()))


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
