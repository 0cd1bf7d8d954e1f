"""Time of the static checks of a release with 300 MB of weights, and that torch is not imported.

python bench/untrusted.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fintune import console

ROUNDS = 5
_CODE = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from fintune.untrusted.static import static_checks
found = [*static_checks(Path(sys.argv[1]), "release")]
seconds = time.perf_counter() - start
heavy = sorted({"torch", "transformers", "peft"} & set(sys.modules))
print(seconds, [check.detail for check in found if check.status == "failed"], heavy, sep="|")
"""


def main() -> None:
    """Print seconds of each round, the median, and what heavy modules were imported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        matrix = rng.standard_normal((1024, 1024), dtype=np.float32)
        tensors = {
            f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{part}.weight": matrix
            for n in range(36)
            for part in "AB"
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 64, "lora_alpha": 128, "target_modules": ["q_proj"]}
        config["base_model_name_or_path"] = "someone/base"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        sums = subprocess.run(["sha256sum", *(p.name for p in folder.iterdir())], cwd=folder,
                              capture_output=True, text=True, check=True).stdout  # fmt: skip
        (folder / "SHA256SUMS").write_text(sums)
        size = sum(path.stat().st_size for path in folder.iterdir())
        rounds = []
        for _ in range(ROUNDS):
            done = subprocess.run([sys.executable, "-c", _CODE, name], capture_output=True,
                                  text=True, check=True)  # fmt: skip
            seconds, failed, heavy = done.stdout.strip().split("|")
            console.result(f"{float(seconds):.2f} s, failed: {failed}, imported: {heavy}")
            rounds.append(float(seconds))
        console.result(f"{size / 1e6:.0f} MB: median {statistics.median(rounds):.2f} s")


if __name__ == "__main__":
    main()
