"""`verify --server` on llama.cpp's own server: what it says of each form of a release.

    python tools/llama_server.py runs/demo/release path/to/llama-server

Exports base, adapter and merged model as f16 GGUF files, makes Q8_0 and Q4_K_M of them where
`llama-quantize` lies beside the server, serves each in turn on loopback and prints the verdicts.
Exit code 1 where one is not what it must be. llama-server is part of llama.cpp
(`cmake --build build --target llama-server llama-quantize`).
"""

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fintune import console
from fintune.files import read_json
from fintune.model import load_base, load_release, release_base
from fintune.releasing import gguf
from fintune.releasing.server_check import ReleaseServer, check_server
from fintune.untrusted.checks import FIXTURE
from fintune.untrusted.probe import read_tokenizer

PORT, START_S = 8391, 120
EXPECTED = {
    ("merged", "f16"): "adapter answers as the adapter",
    ("base+adapter", "f16"): "adapter answers as the adapter",
    ("base", "f16"): "the same as the base",
    ("merged", "Q8_0"): "adapter answers as the adapter",
    ("base+adapter", "Q8_0"): "adapter answers as the adapter",
    ("base", "Q8_0"): "the same as the base",
    ("merged", "Q4_K_M"): "weights coarser than 8 bits",
}
"""Form and type -> what is said of it."""


def export(release: Path, place: Path) -> None:
    """Write base, adapter and merged model as f16 files."""
    base = release_base(release, None)
    loaded = load_release(release, base, dtype="fp32")
    plain = replace(loaded, model=load_base(base, "none", "fp32"))
    gguf.write_model(plain, place / "base-f16.gguf", "f16", "base")
    gguf.write_adapter(release, base, place / "adapter.gguf", "f16")
    merged: Any = loaded.model.merge_and_unload()
    gguf.write_model(replace(loaded, model=merged), place / "merged-f16.gguf", "f16", "merged")


def said(release: Path, program: Path, place: Path, form: str, dtype: str) -> str:
    """What is said of the server of a form."""
    model, _, lora = form.partition("+")
    words = ["-m", place / f"{model}-{dtype}.gguf", "--port", PORT, "--alias", "adapter"]
    words += ["--lora", place / "adapter.gguf"] if lora else []
    words += ["--jinja", "--chat-template-file", release / "chat_template.jinja"]
    given = [str(program), "--host", "127.0.0.1", "-c", "2048", "-t", "1", *map(str, words)]
    with (place / "log").open("w") as log, subprocess.Popen(given, stdout=log, stderr=log) as made:
        try:
            url, end = f"http://127.0.0.1:{PORT}", time.monotonic() + START_S
            while made.poll() is None and time.monotonic() < end:
                with suppress(OSError):
                    urllib.request.urlopen(f"{url}/health").close()
                    break
                time.sleep(0.2)
            server, golden = ReleaseServer(url, release), read_json(release / FIXTURE)
            checks = check_server(server, golden, read_tokenizer(release))
            return "; ".join(check.detail for check in checks if check.status != "note")
        finally:
            made.terminate()


def main() -> None:
    """Print a line for every form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("release", type=Path)
    parser.add_argument("server", type=Path)
    args = parser.parse_args()
    wrong, quantize = 0, args.server.with_name("llama-quantize")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        export(args.release, place)
        for (form, dtype), expected in EXPECTED.items():
            path = place / f"{form.partition('+')[0]}-{dtype}.gguf"
            if not path.is_file() and quantize.is_file():
                whole = path.with_name(path.name.replace(dtype, "f16"))
                subprocess.run([quantize, whole, path, dtype, "1"], check=True, capture_output=True)
            if path.is_file():
                found = said(args.release, args.server, place, form, dtype)
                wrong += expected not in found
                console.result(f"{form} {dtype}: {found}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
