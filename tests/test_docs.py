"""README and docs: every command exists with its options, every link and picture is there."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fintune.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_group(app).commands


def options(words: list[str]) -> set[str]:
    """Options of a command, or of its subcommand where it has some."""
    command = COMMANDS[words[0]]
    if hasattr(command, "get_command"):
        command = command.get_command(None, words[1])
    return {option for param in command.params for option in (*param.opts, *param.secondary_opts)}


def shell_lines(page: Path) -> list[str]:
    """Lines of the page's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        if not words or not words[0].endswith("fintune"):
            continue
        given = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
        assert given <= options(words[1:]) | {"--help"}, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_states_the_figures_of_the_results() -> None:
    """The control experiment's table is what bench/control.py last wrote."""
    found = json.loads((ROOT / "bench" / "results" / "control.json").read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for who in ("base", "control", "always the commonest", "adapter"):
        assert f"| {who} | {found[who]['accuracy']:.1%} |" in text


def figures(name: str) -> dict[str, Any]:
    """A results file of bench."""
    found: dict[str, Any] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    return found


def data_rows() -> Iterator[str]:
    """The lines of the table in docs/data.md, from what bench/prepare.py last wrote."""
    data = figures("data")
    language, related, personal = data["language"], data["related"], data["personal"]
    planted, alone = data["contamination"]["held_out"], data["siblings"]
    recall = planted["recall"]
    yield (
        f"| non-English rows found | >= 99.5 % | {language['recall']:.1%} of"
        f" {language['non_english_rows']}"
    )
    yield (
        f"| English rows lost as foreign | <= 0.1 % | {language['english_lost']} of"
        f" {language['english_rows']:,}"
    )
    ascii_alone = ", ".join(
        f"{language[f'plain_ascii_recall_{at}']:.0%}" for at in (0.7, 0.9, 0.98)
    )
    yield f"| found by an ASCII ratio of 0.7, 0.9, 0.98 alone | none asked | {ascii_alone}"
    speed = language["rows_per_second_one_process"]
    yield f"| language: rows a second, one process | >= 15,000 | {speed:,}"
    yield f"| related pairs never on both sides | >= 95 % | {related['never_on_both_sides']:.1%}"
    yield f"| exact pairs on both sides | 0 | {related['exact_on_both_sides']}"
    yield (
        "| document rows wrongly dropped as duplicates | <= 0.5 % |"
        f" {related['document_rows_wrongly_dropped']} of {related['document_rows']:,}"
    )
    yield f"| benchmark questions found, verbatim | all | {recall['verbatim']:.1%}"
    yield f"| clauses reordered | >= 95 % | {recall['clauses_reordered']:.1%}"
    yield f"| 30 % of words replaced | >= 95 % | {recall['words_replaced_30_percent']:.1%}"
    yield f"| numbers changed | published | {recall['numbers_changed']:.1%}"
    yield f"| false hits in 20,000 rows, worst of 4 | <= 0.5 % | {max(planted['false_share']):.2%}"
    yield (
        f"| rows of the sample alone dropped | none asked | {alone['dropped']} of"
        f" {alone['rows']:,} ({alone['share']:.1%})"
    )
    yield f"| personal data found | >= 98 % | {personal['recall']:.1%} of {personal['planted']}"
    yield f"| clean rows flagged | <= 0.5 % | {personal['clean_share_flagged']:.2%}"
    yield (
        f"| 518,185 rows: time | <= 240 s | {data['scale']['seconds']:.0f} s"
        f" ({data['scale']['cpu_seconds_of_all_processes']:.0f} CPU s)"
    )
    yield (
        "| 518,185 rows: peak memory | <= 2 GB |"
        f" {data['scale']['peak_gigabytes_of_all_processes']:.2f} GB"
    )
    tokens, kill = data["tokens"], data["kill"]
    yield f"| tokenising beside TRL's | >= 3 times | {tokens['ratio']:.1f} times"
    yield f"| labels other than TRL's | 0 | {tokens['rows_with_other_labels']} rows"
    yield (
        f"| `kill -9` at random moments: partial folders | 0 |"
        f" {kill['partial_under_the_final_name']} of {kill['kills']}"
    )


def evaluation_rows() -> Iterator[str]:
    """The lines of the table in docs/evaluation.md, from what bench/evaluation.py last wrote."""
    found = figures("evaluation")
    cases, reworded = found["numbers"]["cases"], found["numbers"]["rewordings"]
    none, gain = found["power"]["planted_0%"], found["power"]["planted_20%"]
    yield f"| our own table of number cases | 100 % | {cases['right']} of {cases['n']}"
    yield (
        f"| gold answers of the benchmarks, reworded | >= 99 % | {reworded['right']:,} of"
        f" {reworded['n']:,}"
    )
    yield f"| planted gain of 20 points found, 200 questions | >= 95 % | {gain['better']:.1%}"
    yield f"| no gain called `better` | <= 3.5 % | {none['better']:.1%}"
    yield (
        f"| no gain called `better` or `worse` | <= 6.5 % | {none['better'] + none['worse']:.1%}"
    )
    again = found["rescore"]
    yield (
        f"| rescoring {again['questions']} questions and {again['judge_calls']} verdicts | <= 2 s |"
        f" {again['seconds_of_the_command']:.1f} s"
    )
    yield f"| calls of a second run | 0 | {again['calls_of_a_second_run']}"
    answered = found["generation"]
    yield (
        f"| {answered['answers']} answers, batched against one by one | >= 5 times |"
        f" {answered['ratio']} times"
    )
    faults, wall = found["faults"], found["wall"]
    yield f"| kinds of network fault as wanted | all | {faults['as_wanted']} of {faults['kinds']}"
    yield (
        f"| {wall['calls']} calls of 2 s, 8 at once | <= {wall['allowed_seconds']} s |"
        f" {wall['seconds']} s (load {wall['machine']['load_when_started']} on 2 cores)"
    )


def curve_rows() -> Iterator[str]:
    """Lines of the second table in docs/engine.md, from what bench/curve.py last wrote."""
    for name, found in figures("curve")["stratified_against"].items():
        low, high = found["interval"]
        yield f"| {name} | <= +0.5% | {found['mean']:+.1%} ({low:+.1%} to {high:+.1%})"


def serving_rows() -> Iterator[str]:
    """Lines of the table in docs/serving.md, from what bench/serve_load.py last wrote."""
    found = figures("serve")
    ratio, first = found["concurrency"]["ratio"], found["first_token"]
    yield f"| their throughput against one at a time | >= 4 times | {ratio} times"
    yield f"| first token, idle | <= 100 ms | {first['median_ms']} ms (worst {first['worst_ms']})"


def engine_rows() -> Iterator[str]:
    """The lines of the table in docs/engine.md, from what bench/throughput.py last wrote."""
    found = figures("throughput")
    sides, plans = found["sides"], found["plans"]
    grouped = "transformers group_by_length"
    ours, theirs = plans["ours"], plans[grouped]
    ran = [name for name in sides if name.startswith("trl")]
    trl = min(ran, key=lambda name: float(sides[name]["ours_is_times_faster"]))

    def times(name: str) -> str:
        return f"{sides[name]['ours_is_times_faster']:.2f} times"

    yield f"| transformers + peft, group_by_length | >= 1.6 times | {times(grouped)}"
    recomputed = times(f"{grouped}, checkpointing")
    yield f"| the same, activations recomputed | >= 2.2 times | {recomputed}"
    assert trl == max(found["heats"], key=found["heats"].__getitem__)
    yield f"| {trl}, the fastest of three | >= 1.5 times | {times(trl)}"
    yield f"| the frozen base alone | >= 0.75 times | {times('floor')}"
    fused = times("floor, our norms and rotation")
    yield f"| the same with our norms and rotation in it | none asked | {fused}"
    memory = sides["ours"]["peak_above_model_mb"] / sides[grouped]["peak_above_model_mb"]
    yield f"| memory above the model, against group_by_length | <= 33 % | {memory:.0%}"
    yield f"| padding of the plan | 0 % | {ours['padding']:.0%}"
    largest = ours["largest_micro_batch"] / theirs["largest_micro_batch"]
    yield f"| largest micro-batch, against group_by_length's | <= 20 % | {largest:.0%}"
    yield f"| step tokens, deviation over mean | <= 0.03 | {ours['step_token_cv']:.3f}"
    yield (
        f"| correlation of neighbouring steps' lengths | within 0.05 |"
        f" {ours['neighbour_correlation']:.3f}"
    )
    seeds = plans["neighbour_correlation_of_seeds"]
    yield f"| the same, mean of 100 seeds | none asked | {seeds['mean']:.3f}"


def test_the_readme_states_the_kills_of_the_results() -> None:
    found = figures("survival")["kills"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    stated = f"{found['kills']} kills at random moments, {found['identical_runs']} of"
    assert f"{stated} {found['runs']} runs identical" in text


def deal_rows() -> Iterator[str]:
    """What bench/deal.py last wrote."""
    found = figures("deal")
    cost = found["cost"]
    yield f"| plan of {found['rows']:,} lengths: time | <= 2 s | {cost['seconds']} s"
    yield f"| its memory | <= 200 MB | {cost['peak_mb']} MB"
    for world, over in found["imbalance"].items():
        shown = f"{over['mean']:.1%} (worst {over['worst']:.1%})"
        yield f"| busiest of {world} processes, over the mean | <= 2 % | {shown}"


def plan_rows() -> Iterator[str]:
    """What bench/plan.py last wrote."""
    for run in figures("plan")["runs"]:
        memory = f"{run['planned_peak_mb']:,} / {run['measured_peak_mb']:,} MB"
        seconds = f"{run['planned_seconds']:.0f} / {run['measured_seconds']:.0f} s"
        errors = f"{run['peak_error']:+.0%} | {seconds} | {run['time_error']:+.0%}"
        yield f"| {run['hidden']} | {run['precision']} | {memory} | {errors}"


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("engine", engine_rows),
        ("engine", curve_rows),
        ("engine", deal_rows),
        ("engine", plan_rows),
        ("serving", serving_rows),
        ("data", data_rows),
        ("evaluation", evaluation_rows),
    ],
)
def test_the_docs_state_the_figures_of_the_results(
    page: str, rows: Callable[[], Iterator[str]]
) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for row in rows():
        assert f"{row} |" in text, row


def test_the_readme_states_figures_of_the_results() -> None:
    """Every line of README's tables of figures is a line of the tables in docs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"(?m)^(\| [^|\n]+ \| (?:[<>]=|all|none|100 %)[^|\n]* \|[^|\n]*) \|$", text)
    assert len(shown) >= 8
    assert set(shown) <= {*engine_rows(), *data_rows(), *evaluation_rows()}
