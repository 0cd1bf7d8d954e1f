"""`eval_50_gpt_judged_raw.jsonl`: a line a judge call, or a line an item without a judge.

Arithmetic outranks the judge: where exactly one completion is right by number or label, that
decides the item, and the judge's opposite opinion is counted against the judge.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fintune.config import JudgeConfig
from fintune.errors import DataError
from fintune.evals import calls, judge, stats
from fintune.evals.items import VARIANTS, Pair
from fintune.files import FORMAT, read_jsonl, sha256_bytes

NAME = "eval_50_gpt_judged_raw.jsonl"
SCORE = {"adapter": 1.0, "tie": 0.5, "base": 0.0}
"""What an outcome of a pair counts in the adapter's win rate."""


def plan(pairs: Sequence[Pair], config: JudgeConfig, seed: int) -> list[judge.Call]:
    """The calls over the items of the judged set; none without a judge."""
    items = [(pair.item, {name: pair.text(name) for name in VARIANTS}) for pair in pairs]
    return judge.plan(items, config, seed=seed) if config.model else []


def pending(folder: Path, pairs: Sequence[Pair], config: JudgeConfig, seed: int) -> bool:
    """Whether a judge is configured that has calls still to make."""
    return any(call.key not in calls.finished(folder) for call in plan(pairs, config, seed))


def unjudged_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The lines of the raw file before any judge is asked."""
    return [{**_facts(pair), "status": "unscored", "unscored_reason": "no_judge"} for pair in pairs]


def judged_rows(
    folder: Path, pairs: Sequence[Pair], config: JudgeConfig, seed: int, judge_host: str = ""
) -> list[dict[str, Any]]:
    """The lines of the raw file; asks the judge what it was not asked yet.

    Raises:
        ConfigError, ModelError, GateRefused: see `calls.ask`.
    """
    facts = {pair.item.id: _facts(pair) for pair in pairs}
    human, planned = _labels(config.labels), plan(pairs, config, seed)
    done = calls.ask(folder, planned, config, judge_host)
    rubric = sha256_bytes(judge.RUBRIC.encode())
    return [
        {
            **facts[call.item],
            "key": call.key,
            "model": config.model,
            "rubric_sha256": rubric,
            "positions": call.positions,
            "canary": call.control,
            "expect": call.expect,
            "human": None if call.control else human.get(call.item),
            **{name: part for name, part in done[call.key].items() if name not in ("row", "key")},
        }
        for call in planned
    ]


def _facts(pair: Pair) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "id": pair.item.id,
        "task": pair.item.task,
        "question": pair.item.question,
        "reference": pair.item.reference,
        "answers": {name: pair.text(name) for name in VARIANTS},
        "deterministic": {
            name: asdict(graded) if (graded := pair.graded[name]) else None for name in VARIANTS
        },
    }


def _labels(path: Path | None) -> dict[str, str]:
    """Human verdicts (`base`, `adapter`, `tie`) by item."""
    if path is None:
        return {}
    try:
        labels = {row["id"]: row["verdict"] for row in read_jsonl(path)}
    except (OSError, ValueError, KeyError, TypeError):
        labels = {"": ""}
    if set(labels.values()) <= SCORE.keys():
        return labels
    raise DataError(
        f"eval.judge.labels: {path} is no file of human verdicts",
        fix='lines such as {"id": "...", "verdict": "adapter"}; or base, or tie',
    )


def summary(
    rows: Sequence[dict[str, Any]],
    decided: dict[str, str | None],
    groups: dict[str, str],
    seed: int,
) -> dict[str, Any] | None:
    """What the judge's calls add up to; None where no judge was asked.

    Args:
        rows: of the raw file, one a call.
        decided: for every item whose completion arithmetic or label prefers, or None.
        groups: the document of every item, the unit of resampling.
    """
    asked = [row for row in rows if row.get("key")]
    if not asked:
        return None
    pairs = [row for row in asked if row["canary"] is None]
    controls = [row for row in asked if row["canary"] is not None]
    labelled = [(row["outcome"], row["human"]) for row in pairs if row["human"] and row["outcome"]]
    return {
        "model": asked[0]["model"],
        "served": sorted({row["served_model"] for row in asked if row["served_model"]}),
        "rubric_sha256": asked[0]["rubric_sha256"],
        "calls": len(asked),
        "unscored": stats.rate(sum(row["status"] != "scored" for row in asked), len(asked)),
        "canaries": {
            "ok": sum(row["outcome"] == row["expect"] for row in controls),
            "of": len(controls),
            "failed": sorted(
                {row["canary"] for row in controls if row["outcome"] != row["expect"]}
            ),
        },
        "cost": {
            "usd": round(sum(row["usage"]["usd"] for row in asked), 6),
            "tokens_in": sum(row["usage"]["in"] for row in asked),
            "tokens_out": sum(row["usage"]["out"] for row in asked),
        },
        **_pairwise(pairs, decided, groups, seed),
        **({"human": _agreement(labelled)} if labelled else {}),
    }


def _agreement(labelled: list[tuple[str, str]]) -> dict[str, Any]:
    said, human = zip(*labelled, strict=True)
    alike = sum(one == other for one, other in labelled)
    return {
        "n": len(labelled),
        "kappa": round(stats.kappa(said, human), 6),
        "agreement": stats.rate(alike, len(labelled)),
    }


def _pairwise(
    rows: list[dict[str, Any]], decided: dict[str, str | None], groups: dict[str, str], seed: int
) -> dict[str, Any]:
    orders: dict[str, list[str | None]] = {}
    for row in rows:
        orders.setdefault(row["id"], []).append(row["outcome"])
    wins: dict[str, str] = {}
    consistent = against = unscored = 0
    for key, (one, other) in orders.items():
        opinion = None if not (one and other) else one if one == other else "tie"
        consistent += opinion is not None and one == other
        exact = decided.get(key)
        against += exact is not None and opinion not in (None, "tie", exact)
        if exact or opinion:
            wins[key] = exact or opinion or ""
        else:
            unscored += 1
    scores = [SCORE[winner] for winner in wins.values()]
    n, total = len(scores), sum(scores)
    chosen = [row for row in rows if row["outcome"] in VARIANTS]
    first = sum(row["outcome"] == row["positions"][0] for row in chosen)
    names = [groups[key] for key in wins]
    return {
        "win_rate": {
            "value": round(total / n, 6) if n else None,
            "difference": stats.paired([s - 0.5 for s in scores], names, seed=seed).as_json(),
            "won": scores.count(1.0),
            "tied": scores.count(0.5),
            "lost": scores.count(0.0),
            "p": round(stats.mcnemar_midp(scores.count(1.0), scores.count(0.0)), 6),
            "bounds_with_unscored": [
                round((total + add) / max(len(orders), 1), 6) for add in (0, unscored)
            ],
        },
        "reliability": {
            "swap_consistency": stats.rate(consistent, len(orders)),
            "first_slot": stats.rate(first, len(chosen)),
            "decided_by_arithmetic": sum(decided.get(key) is not None for key in orders),
            "against_arithmetic": against,
        },
        "items": wins,
    }
