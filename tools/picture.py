"""The pictures in the docs: `python tools/picture.py runs/demo`.

docs/compare.png: the release is served, and Chromium asks the second example.
docs/evaluation.png: the top of the evaluation's report.
"""

import argparse
import shutil
import threading
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from fintune import console
from fintune.model import load_release, open_release
from fintune.serve.app import running

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--port", type=int, default=8124)
    options = parser.parse_args()
    release, report = options.run / "release", options.run / "eval" / "report.html"
    loaded = load_release(release, open_release(release, None))
    with running(loaded, release, host="127.0.0.1", port=options.port, key=None) as server:
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        with sync_playwright() as engine:
            browser = engine.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1100, "height": 780}, color_scheme="light")
            page.set_default_timeout(240_000)
            page.goto(f"http://127.0.0.1:{options.port}/")
            page.get_by_text("Held-out questions of this run").wait_for()
            page.get_by_role("group", name="Examples").get_by_role("button").nth(1).click()
            page.get_by_text("Both have answered.").wait_for()
            page.screenshot(path=DOCS / "compare.png")
            page.set_viewport_size({"width": 1070, "height": 1460})
            page.goto(report.resolve().as_uri())
            page.screenshot(path=DOCS / "evaluation.png")
            browser.close()
        server.should_exit = True
    console.say("wrote compare.png and evaluation.png")


if __name__ == "__main__":
    main()
