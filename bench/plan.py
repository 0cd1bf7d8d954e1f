"""`fintune plan` against real runs on a CPU: three shapes, peak memory and time.

    python bench/plan.py        # five minutes on a free machine; rewrites bench/results/plan.json

Each run is `fintune train` through its stage in a fresh process on a random Llama of the shape and
the bundled rows; its peak is the kernel's count of resident memory. Where other work shares the
machine wall time means little, so seconds are the processor's, of one thread, on both sides.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "plan.json"
sys.path.insert(0, str(ROOT / "src"))

SHAPES = {  # hidden: (intermediate, layers, heads, kv_heads)
    128: (352, 6, 4, 2),
    256: (768, 8, 4, 2),
    512: (1536, 8, 8, 4),
}
STEPS = 8
RUN = """
import json, resource, sys, time, torch, transformers
torch.set_num_threads(1)
from fintune.config import load_config
from fintune.train import run
inner = transformers.Trainer.train
def timed(self, *args, **keywords):
    start = time.process_time()
    try:
        return inner(self, *args, **keywords)
    finally:
        print(json.dumps({"seconds": time.process_time() - start}))
transformers.Trainer.train = timed
run.train(load_config("nano", sys.argv[1:]))
"""
PLAN = """
import json, sys, time, torch
torch.set_num_threads(1)
from fintune import calibrate, plan
from fintune.config import load_config
from fintune.planning import shapes
calibrate.perf_counter = time.process_time
config = load_config("nano", sys.argv[1:])
here = calibrate.this_machine(config, None, None)
print(json.dumps({**here, "files": plan.files(shapes.find_shape(config.model), config)}))
"""


def base(folder: Path, hidden: int) -> None:
    """A random Llama of the shape with the bundled tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fintune import nano

    for path in nano.base_dir().glob("*"):
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    intermediate, layers, heads, kv_heads = SHAPES[hidden]
    config = LlamaConfig.from_pretrained(nano.base_dir())
    config.update({"hidden_size": hidden, "intermediate_size": intermediate})
    config.update({"num_hidden_layers": layers, "num_attention_heads": heads})
    config.update({"num_key_value_heads": kv_heads, "head_dim": hidden // heads})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def child(code: str, settings: list[str]) -> tuple[dict, float]:
    """Run a program in a fresh process; its last line of JSON, and its peak resident bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", code, *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    out = process.stdout.read()  # type: ignore[union-attr]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(settings)}\n{out}")
    return json.loads(out.strip().splitlines()[-1]), usage.ru_maxrss * 1024


def measure(root: Path, hidden: int, precision: str) -> dict:
    """Plan, then run."""
    folder = root / str(hidden)
    if not folder.is_dir():
        folder.mkdir()
        base(folder, hidden)
    settings = [
        f"out={root / f'run-{hidden}-{precision}'}",
        f"data.out={root / 'data'}",
        f"model.path={folder}",
        "model.id=bench/random",
        f"train.max_steps={STEPS}",
        "train.eval_steps=4",
        f"train.save_steps={STEPS}",
        "train.eval_rows=64",
        f"train.precision={precision}",
    ]
    if not (root / "data").is_dir():
        from fintune.config import load_config
        from fintune.data.prepare import prepare

        prepare(load_config("nano", settings))
    planned, _ = child(PLAN, settings)
    ran, peak = child(RUN, settings)
    run = root / f"run-{hidden}-{precision}" / "run"
    facts = json.loads((run / "environment.json").read_text())
    checkpoint = run / "checkpoints" / f"checkpoint-{STEPS}"
    adapter, states = checkpoint / "adapter_model.safetensors", checkpoint / "optimizer.pt"
    files = planned["files"]
    seconds = sum(planned["seconds"].values())
    return {
        "hidden": hidden,
        "precision": precision,
        "planned_peak_mb": round(planned["peak"] / 1e6),
        "measured_peak_mb": round(peak / 1e6),
        "peak_error": round(planned["peak"] / peak - 1, 4),
        "planned_seconds": round(seconds, 2),
        "measured_seconds": round(ran["seconds"], 2),
        "time_error": round(seconds / ran["seconds"] - 1, 4),
        "parameters_exact": files["trainable_parameters"] == facts["trainable_parameters"],
        "adapter_exact": files[adapter.name] == adapter.stat().st_size,
        "optimizer_exact": files[states.name] == states.stat().st_size,
        "optimizer_bytes": [files[states.name], states.stat().st_size],
        "memory": planned["memory"],
    }


def main() -> None:
    """Measure all, print and write."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(Path(folder), h, p) for p in ("fp32", "bf16") for h in SHAPES]
    for row in runs:
        sys.stdout.write(json.dumps({k: v for k, v in row.items() if k != "memory"}) + "\n")
    result = {
        "shapes": {str(h): s for h, s in SHAPES.items()},
        "steps": STEPS,
        "runs": runs,
        "largest_peak_error": max(abs(row["peak_error"]) for row in runs),
        "largest_time_error": max(abs(row["time_error"]) for row in runs),
        "seconds_in_all": round(time.monotonic() - start),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
