"""The verdict of an evaluation: what decides, what makes it invalid, and its sentences."""

from typing import Any

from fintune.evals import stats
from fintune.evals.grading import PHRASES

Json = dict[str, Any]
FEWEST_CHECKABLE = 100
"""With fewer checkable items than this the judge's win rate decides instead of accuracy."""
FEWEST_ITEMS = 50
"""With fewer items the verdict is `invalid`: 50 detect differences of 18 points and more only."""
FEWEST_DOCUMENTS = 20
"""With fewer effective documents the verdict is `invalid`: with five of them an interval of 95 %
covers 85 %, and one in twelve comparisons of equals would be called `better`."""
MOST_UNSCORED = 0.02
"""Share of judge calls without a readable verdict above which the verdict is `invalid`."""


def decide(run: Json, loss: Json | None, accuracy: Json, tasks: Json, judged: Json | None) -> Json:
    """The fields `verdict`, `primary` (the measure that decided), `guards`, `invalid_reasons`,
    `lost_tasks`, `small_tasks`, `looks`.

    Args:
        loss: None where two adapters are compared, which has no guards; its values are None where
            no row is held out, so that the other guard stands alone.
    """
    by_name = {"accuracy": accuracy["difference"], "macro_accuracy": accuracy["macro"]}
    primary, invalid = run["primary"], list[str]()
    reason = "eval.primary is win_rate" if primary == "win_rate" else ""
    if accuracy["difference"]["n"] < FEWEST_CHECKABLE:
        count = accuracy["difference"]["n"]
        reason = f"{count} checkable items (fewer than {FEWEST_CHECKABLE})"
    if reason and judged:
        primary, by_name["win_rate"] = "win_rate", judged["win_rate"]["difference"]
    elif reason:
        primary = "accuracy"
        invalid.append(f"{reason} and no judge was asked")
    difference = by_name[primary]
    if difference["n"] < FEWEST_ITEMS:
        invalid.append(f"{difference['n']} of the {FEWEST_ITEMS} questions that a verdict needs")
    elif difference["effective"] < FEWEST_DOCUMENTS:
        invalid.append(
            f"{difference['effective']:g} effective documents; "
            f"fewer than {FEWEST_DOCUMENTS} decide nothing"
        )
    if judged and (failed := judged["control_items"]["failed"]):
        invalid.append(f"control items failed: {', '.join(failed)}")
    if judged and (unscored := judged["unscored"]["value"] or 0) > MOST_UNSCORED:
        invalid.append(f"{unscored:.1%} of the judge's calls unscored")
    if run["contaminated"]:
        invalid.append(f"{len(run['contaminated'])} decision rows also occur in training")
    measured = loss and loss["base"] is not None
    guards = {"held_out_loss": loss["adapter"] <= loss["base"]} if loss and measured else {}
    if loss and primary != "win_rate":
        guards["majority_class"] = accuracy["over_majority"]["ci95"][0] > 0
    lost = [name for name, task in tasks.items() if task["lost"]]
    return {
        "verdict": "invalid" if invalid else word(difference, all(guards.values()), bool(lost)),
        "primary": {"measure": primary, **difference},
        "guards": guards,
        "invalid_reasons": invalid,
        "lost_tasks": lost,
        "small_tasks": [name for name, task in tasks.items() if task["small"]],
        "looks": run["looks"],
    }


def word(difference: Json, passed: bool, lost: bool) -> str:
    """The verdict of a valid comparison; interval and sign flip test must both leave out 0."""
    low, high = difference["ci95"]
    if difference["p"] >= stats.LEVEL or low <= 0 <= high or (low > 0 and not passed):
        return "no_detectable_difference"
    if low > 0:
        return "better_with_losses" if lost else "better"
    return "worse"


def summary(results: Json, verdicts: dict[str, str] = PHRASES["verdicts"]) -> list[str]:
    """The verdict and its reasons in sentences, for the terminal and the head of the report.

    Args:
        verdicts: the first sentence by verdict; a comparison of two adapters has its own.
    """
    primary, verdict = results["primary"], verdicts[results["verdict"]]
    low, high = (f"{100 * end:+.1f}" for end in primary["ci95"])
    failed = [PHRASES["guards"][guard] for guard, passed in results["guards"].items() if not passed]
    if results["verdict"] == "no_detectable_difference" and failed and primary["ci95"][0] > 0:
        verdict = verdicts["guarded"]
    if lost := results["lost_tasks"]:
        points = {name: 100 * results["tasks"][name]["difference"]["value"] for name in lost}
        named = ", ".join(f"{name} ({points[name]:+.0f})" for name in lost)
        verdict = f"{verdict} Worse on {named}."
    text = [
        verdict,
        *(f"Reason: {reason}." for reason in results["invalid_reasons"]),
        *(f"Guard failed: {guard}." for guard in failed),
        f"{PHRASES['primaries'][primary['measure']]}: {100 * primary['value']:+.1f} points "
        f"({low} to {high}; {primary['n']} questions of {primary['clusters']} documents); "
        f"a gain below {100 * primary['mde80']:.1f} points would usually be missed.",
    ]
    if (looks := results["looks"]) > 1:
        ends = stats.corrected(primary, looks)
        wide = " to ".join(f"{100 * end:+.1f}" for end in ends)
        text.append(f"Evaluation {looks} of these questions: corrected for that, {wide} points.")
    if missing := results.get("loss_missing"):
        text.append(f"The held-out loss was not measured, so it guards nothing: {missing}.")
    if small := results["small_tasks"]:
        text.append(f"Too small to see a loss of 10 points: {', '.join(small)}.")
    if other := results.get("provenance", {}).get("subject"):
        text.append(other["decontamination"])
    return text
