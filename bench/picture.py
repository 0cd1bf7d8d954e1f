"""The picture of the page in the docs: `python bench/picture.py runs/demo/release`.

Serves the release, asks the second example in Chromium, and writes docs/compare.png.
"""

import argparse
import shutil
import threading
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from fintune import console
from fintune.serve.loaded import load
from fintune.serve.server import running

PICTURE = Path(__file__).parents[1] / "docs" / "compare.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path, nargs="?", default=Path("runs/demo/release"))
    parser.add_argument("--port", type=int, default=8124)
    options = parser.parse_args()
    loaded = load(options.release)
    with running(
        loaded, options.release, host="127.0.0.1", port=options.port, key=None, run=None
    ) as server:
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
            page.screenshot(path=PICTURE)
            browser.close()
        server.should_exit = True
    console.say(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
