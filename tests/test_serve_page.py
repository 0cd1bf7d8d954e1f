"""The page in real Chromium: asks, streams, marks numbers, draws the run; layout, accessibility."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_server import Served, served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        rows = [{"step": step, "loss": 4 / step} for step in range(1, 9)]
        rows += [{"step": step, "eval_loss": 3 / step} for step in (4, 8)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (running.folder.parent / "run" / "metrics.jsonl").write_text(lines)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, server: Served) -> Iterator[Any]:
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(120_000)  # a busy machine answers late, and that is no finding
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    outside: list[str] = []
    page.on("request", lambda r: outside.append(r.url) if server.url not in r.url else None)
    page.goto(server.url)
    yield page
    assert (problems, outside) == ([], [])
    page.close()


def no_horizontal_scroll(page: Any) -> bool:
    return bool(page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"))


def findings(page: Any) -> list[str]:
    """Serious and critical findings of axe-core, where it is installed."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    source = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate("() => { " + source + " }")
    found = page.evaluate("async () => (await axe.run()).violations")
    return [row["id"] for row in found if row["impact"] in {"serious", "critical"}]


def test_asking_by_keyboard_streams_both_answers(page: Any) -> None:
    assert no_horizontal_scroll(page)
    page.keyboard.type("Revenue rose from 4.0 to 5.0. Growth?")  # the question has the focus
    page.keyboard.press("Enter")
    page.get_by_text("Both have answered.").wait_for()
    answers = [page.locator(f".card.{who} .answer").inner_text() for who in ("base", "adapter")]
    assert all(answers) and answers[0] != answers[1]
    assert "tokens in" in page.locator(".card.adapter .dim").last.inner_text()
    page.locator("#prompt summary").click()
    page.locator(".tokens li").first.wait_for()
    assert "<|begin_of_text|>" in page.locator("#prompt pre").inner_text()
    assert no_horizontal_scroll(page)
    assert findings(page) == []


def test_an_example_is_a_held_out_question_with_its_answer(page: Any) -> None:
    chips = page.get_by_role("group", name="Examples").get_by_role("button")
    page.get_by_text("Held-out questions of this run").wait_for()
    assert chips.all_inner_texts() == ["How much?"], "one of each answer, its last line"
    chips.first.click()
    page.get_by_text("Both have answered.").wait_for()
    assert page.locator("#question").input_value() == "Sales: 4.\n\nHow much?"
    assert page.locator("#reference").inner_text() == "The held-out row's own answer: 4"
    page.locator("#question").fill("Another question?")
    page.keyboard.press("Enter")
    page.locator("#reference").wait_for(state="hidden")


def test_run_tab_shows_verdict_and_curves(page: Any) -> None:
    page.get_by_role("tab", name="Compare").focus()
    page.keyboard.press("ArrowRight")
    page.locator("svg").last.wait_for()
    text = page.locator("#run").inner_text()
    assert "better" in text and "75.0 %" in text and "25.0 points more of 240" in text
    assert page.locator("svg .dot").count() == 2
    assert no_horizontal_scroll(page)
    assert findings(page) == []


def test_only_numbers_outside_the_question_are_marked(page: Any) -> None:
    marked = page.evaluate(
        """() => { const node = document.createElement("div");
        show(node, "5 and 5.0 and 1,250 are given; 25%, 7.5 and 2024, are not.",
        "$5.00 of 1250");
        return [...node.querySelectorAll("mark")].map((mark) => mark.textContent); }"""
    )
    assert marked == ["25", "7.5", "2024"]
