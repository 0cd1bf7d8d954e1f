"""Read the finished data, run and evaluation folders, and refuse what they do not prove."""

from dataclasses import dataclass
from typing import Any

from fintune import files, seal
from fintune.config import Config, load_config
from fintune.errors import GateRefused
from fintune.model import WEIGHTS, Base, find_base
from fintune.untrusted import checks, static
from fintune.untrusted.checks import JUDGED, RESULTS

Json = dict[str, Any]
RUN_FILES = ("config.yaml", "environment.json", "training_arguments.json")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a release is made of.

    Attributes:
        config: of this command. recipe: of the training run.
        seals: `done.json` of the folders data, run and eval.
        arguments: transformers' effective TrainingArguments.
        accepted: the reason given for publishing without the verdict `better`.
        provenance: hashes that the release states.
    """

    config: Config
    recipe: Config
    base: Base
    seals: dict[str, Json]
    manifest: Json
    results: Json
    environment: Json
    arguments: Json
    accepted: str | None
    provenance: Json


def read_inputs(config: Config, accepted: str | None) -> Inputs:
    """Read the three finished folders.

    Raises:
        OutputError: one is absent, unfinished or changed since.
    """
    run, evaluation, adapter = config.run_dir, config.eval_dir, f"best/{checks.ADAPTER}"
    made, judged = (adapter, *RUN_FILES), (RESULTS, JUDGED)
    seals = {
        "data": seal.read_data(config.data_dir),
        "run": seal.read_seal(run, stage="training run", make="fintune train", needed=made),
        "eval": seal.read_seal(evaluation, stage="evaluation", make="fintune eval", needed=judged),
    }

    def sha256(stage: str, name: str) -> Any:
        return seals[stage]["files"][name]["sha256"]

    recipe, environment, arguments = (run / name for name in RUN_FILES)
    base = find_base(config.model)
    local = {"base_sha256": base.revision} if WEIGHTS.fullmatch(base.revision) else {}
    return Inputs(
        config=config,
        recipe=load_config(recipe),
        base=base,
        seals=seals,
        manifest=files.read_json(config.data_dir / "manifest.json"),
        results=files.read_json(evaluation / RESULTS),
        environment=files.read_json(environment),
        arguments=files.read_json(arguments),
        accepted=accepted,
        provenance={
            "adapter_sha256": sha256("run", adapter),
            "manifest_sha256": sha256("data", "manifest.json"),
            "test_results_sha256": sha256("eval", RESULTS),
            "judged_sha256": sha256("eval", JUDGED),
            "release": config.release.model_dump(mode="json", exclude={"out"}),
            "accepted": accepted,
            **local,
        },
    )


def gate(inputs: Inputs) -> None:
    """Refuse what the evidence does not prove, naming every reason.

    Raises:
        GateRefused: the verdict is not `better` and none was accepted, the folders do not belong
            together, test rows were trained on, or the adapter is empty or not finite.
    """
    if inputs.accepted is not None and not inputs.accepted.strip():
        raise GateRefused("--accept needs a reason", why="the card prints it for every reader")
    reasons = _mismatches(inputs)
    weights = static.check_weights(inputs.config.run_dir / "best")
    reasons += [check.detail for check in weights if check.status == "failed"]
    verdict = inputs.results.get("verdict")
    if verdict != "better" and inputs.accepted is None:
        reasons.insert(0, f"the verdict is {verdict!r}, not 'better'")
    if reasons:
        raise GateRefused(
            "not released: " + "; ".join(reasons),
            why="a release carries proof, or it is not made",
            fix='a verdict may be accepted with a reason: --accept "..." (the card prints it);'
            " for anything else train or evaluate again",
        )


def _mismatches(inputs: Inputs) -> list[str]:
    """Where data, run and evaluation do not belong together, or leak into each other."""
    data, run, evaluation = (inputs.seals[stage] for stage in ("data", "run", "eval"))
    train, test = (data["files"][f"{name}.parquet"]["sha256"] for name in ("train", "test"))
    trained_on, evaluated = run["inputs"], evaluation["inputs"]
    adapter = inputs.provenance["adapter_sha256"]
    compared = [
        ("run was trained on other data", trained_on["data"]["train.parquet"], train),
        ("run was trained on another base", trained_on["base"]["revision"], inputs.base.revision),
        ("evaluation is of another adapter", evaluated["adapter"], adapter),
        ("evaluation compared with other training rows", evaluated["train"], train),
        ("evaluation decided by other rows", evaluated["test"], test),
        ("evaluation found contaminated test rows", inputs.results["n"]["contaminated"], 0),
    ]
    return [f"the {reason}" for reason, stated, expected in compared if stated != expected]
