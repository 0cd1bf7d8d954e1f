"""The plan: exact where it counts, near what autograd keeps where it estimates."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fintune import attention
from fintune.calibrate import TIME_BAND
from fintune.cli import app
from fintune.collate import flat_batch
from fintune.config import LoraConfig, load_config
from fintune.errors import ConfigError, ModelError
from fintune.files import read_json
from fintune.kernels import pointwise
from fintune.model import attach
from fintune.plan import MEMORY_BAND, files, optimizer_bytes, plan, read_rates
from fintune.planning import estimate, rows, shapes
from fintune.planning.estimate import Setting
from fintune.planning.shapes import SHAPES
from fintune.train import lora, memory

PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b-v0.3": 7_248_023_552,
    "phi-4": 14_659_507_200,
}
"""Parameters as the model pages count them."""


def test_built_in_shapes_have_the_published_number_of_parameters() -> None:
    assert {name: SHAPES[name].parameters for name in PUBLISHED} == PUBLISHED


def test_the_published_recipe(tmp_path: Path) -> None:
    """Exact: 167,772,160 trained; 3,125 updates, 63 evaluations; 30 % spent on them."""
    changes = [f"out={tmp_path}", "data.max_validation_rows=8000", "train.eval_rows=4000"]
    found = plan(load_config("llama-3.1-8b-finance", changes))
    assert found["adapter"]["trainable_parameters"] == 167_772_160
    assert (found["work"]["updates"], found["work"]["evaluations"]) == (3125, 63)
    assert found["work"]["evaluation_share"] == pytest.approx(0.29, abs=0.01)
    assert any("30% of the run is evaluation" in note for note in found["notes"])
    peaks = {
        (s["quantization"], s["activation_checkpointing"]): s["peak"] for s in found["settings"]
    }
    assert peaks["4bit", True] < peaks["8bit", True] < peaks["none", True] < peaks["none", False]
    # 2 bytes a weight, and what 128,256 tokens of fp32 logits may take at a time.
    held = found["settings"][1]["memory"]
    assert held["weights"] == 2 * PUBLISHED["llama-3.1-8b"]
    fits = {gpu["gpu"]: gpu["fits"] for gpu in found["gpus"]}
    assert fits["H200"] and not fits["T4"]


def test_the_preset_for_24_gb_fits_24_gb(tmp_path: Path) -> None:
    found = plan(load_config("llama-3.1-8b-finance-24gb", [f"out={tmp_path}"]))
    (configured,) = [setting for setting in found["settings"] if setting["configured"]]
    assert configured["quantization"] == "4bit"
    assert configured["peak"] * (1 + found["memory_band"]) < 22 * 2**30


@pytest.mark.parametrize("name", ["llama-3.1-8b-finance-24gb", "llama-3.1-8b-finance-8gpu"])
def test_presets_keep_the_published_update(name: str) -> None:
    train = load_config(name).train
    assert train.micro_batch_size * train.accumulation == 64
    assert (train.lora.r, train.lora.alpha, train.lora.dropout) == (64, 128, 0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("fused", "shared"), [(True, True), (True, False), (False, True)])
def test_kept_activations_are_what_autograd_keeps(
    precision: str, fused: bool, shared: bool
) -> None:
    """Two shapes, fused and left to peft, in both precisions: within 5 %, where 15 % is asked."""
    for hidden, intermediate, heads, kv_heads in ((64, 160, 4, 2), (128, 352, 4, 4)):
        config = LoraConfig(r=8, dropout=0.1, shared_dropout=shared)
        kept = []
        for layers in (1, 3):
            base = LlamaForCausalLM._from_config(
                LlamaConfig(
                    vocab_size=512,
                    hidden_size=hidden,
                    intermediate_size=intermediate,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    num_key_value_heads=kv_heads,
                ),
                attn_implementation=attention.NAME,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            )
            model = attach(base.requires_grad_(False), config, seed=1)
            assert pointwise.fuse(model) == 2 * layers + 1
            if fused:
                assert not lora.fuse(model, shared_dropout=shared)
            ids = list(range(256))
            kept.append(
                memory.kept_bytes(model, flat_batch([{"input_ids": ids, "labels": ids}]), precision)
            )
        shape = shapes.Shape(512, hidden, intermediate, 2, heads, kv_heads, hidden // heads)
        quantization = "none" if fused else "4bit"  # a quantised base is what is left to peft
        setting = Setting(
            quantization, False, 1, 256, 255, 2 if precision == "bf16" else 4, cuda=False
        )
        planned = estimate.kept_per_token(shape, config, setting)
        copies = setting.element * shape.trainable(config) / shape.layers if fused else 0
        measured = (kept[1] - kept[0]) / 2
        assert planned * 256 + copies == pytest.approx(measured, rel=0.05), (
            hidden,
            precision,
            fused,
        )


def test_files_have_the_planned_size(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = load_config("nano")
    shape = shapes.find_shape(config.model)
    planned = files(shape, config)
    tensors = shape.adapter_tensors(config.train.lora)
    weights = {name: torch.zeros(size) for name, size in tensors.items()}
    save_file(weights, tmp_path / "adapter", metadata={"format": "pt"})
    assert (tmp_path / "adapter").stat().st_size == planned["adapter_model.safetensors"]
    assert written(list(tensors.values()), tmp_path) == planned["optimizer.pt"]


@pytest.mark.parametrize("layers", range(1, 9))
def test_the_optimizer_file_of_any_shape_has_the_planned_size(layers: int, tmp_path: Path) -> None:
    """Records start at multiples of 64 bytes, so a few bytes off show in some shapes only."""
    sizes = [(8, 64), (300, 8), (8, 300), (64, 8)] * layers
    assert optimizer_bytes(sizes) == written(sizes, tmp_path)


def written(sizes: list[tuple[int, int]], folder: Path) -> int:
    """Bytes of optimizer.pt as the Trainer leaves it: accelerate's wrapper around AdamW."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    groups = [{"params": parameters, "initial_lr": 0.1}, {"params": [], "initial_lr": 0.1}]
    optimizer = Accelerator(cpu=True).prepare(torch.optim.AdamW(groups))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return (folder / "optimizer.pt").stat().st_size


def test_the_bands_are_wider_than_what_was_measured() -> None:
    found = read_json(Path(__file__).parents[1] / "bench" / "results" / "plan.json")
    assert found["largest_peak_error"] <= MEMORY_BAND <= 0.15
    assert found["largest_time_error"] <= TIME_BAND <= 0.25


def test_prepared_rows_are_counted(prepared: Path, tiny_base: Path) -> None:
    changes = [f"data.out={prepared}", f"model.path={tiny_base}", "model.id=test/tiny"]
    config = load_config("nano", changes)
    found = rows.lengths(config, None, None)
    assert not found.assumed
    assert 0.05 < found.supervised < 0.95
    assert len(rows.lengths(config, 1000, 100).train) == 1000
    assert rows.lengths(config, 1000, 100).train.mean() == pytest.approx(100, rel=0.05)


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(ModelError, match="not built in"):
        shapes.find_shape(load_config("nano", ["model.id=someone/unknown"]).model)
    with pytest.raises(ConfigError, match="no q_proj"):
        SHAPES["phi-4"].adapted(LoraConfig(target_modules=("q_proj",)))
    for rate in ("A1000=1", "L4=-1", "L4=nan", "L4=inf", "L4"):
        with pytest.raises(ConfigError, match="GPU=USD"):
            read_rates([rate])
    assert read_rates(["rtx 4090=0.5"]) == {"RTX 4090": 0.5}


def test_the_verb(tmp_path: Path) -> None:
    command = ["plan", "-c", "llama-3.1-8b-finance-24gb", "-s", f"out={tmp_path}", "--rows", "2000"]
    done = CliRunner().invoke(app, [*command, "--rate", "L4=1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["cheapest"] == "L4"
    (said,) = (note for note in found["notes"] if note.startswith("cheapest"))
    settings = re.findall(r"-s (\S+)", said)
    assert len(settings) == 4
    load_config("llama-3.1-8b-finance-24gb", settings)  # as a person would paste them
    assert found["work"]["rows"] == 2000
    shown = CliRunner().invoke(app, command)
    assert "167,772,160" in shown.output
    assert max(len(line) for line in shown.stdout.splitlines() if line[:1] in "┏┃│└") <= 80


def test_a_cap_on_tokens_is_planned_as_it_is_trained(tmp_path: Path) -> None:
    free = load_config("nano", [f"out={tmp_path}"])
    lengths = rows.lengths(free, None, None).train
    capped = load_config("nano", [f"out={tmp_path}", "train.max_tokens=2100"])
    plans = [rows.plan_batches(each, lengths, 16) for each in (free, capped)]
    assert plans[1].largest <= 2100 < plans[0].largest
    assert plans[1].updates == plans[0].updates and plans[1].passes > plans[0].passes
    with pytest.raises(ConfigError, match="max_tokens"):
        rows.plan_batches(
            load_config("nano", [f"out={tmp_path}", "train.max_tokens=20"]), lengths, 16
        )


def test_the_last_update_is_evaluated_too(tmp_path: Path) -> None:
    for every, expected in ((50, 4), (99, 2), (500, 1)):
        config = load_config("nano", [f"out={tmp_path}", f"train.eval_steps={every}"])
        found = rows.lengths(config, 2112, 100)
        planned = rows.plan_batches(config, found.train, config.train.micro_batch_size)
        assert planned.updates == 198
        assert rows.work(config, found, planned).evaluations == expected


def test_a_base_in_parts_is_not_planned_quantised(tmp_path: Path) -> None:
    config = load_config(
        "llama-3.1-8b-finance",
        [f"out={tmp_path}", "train.strategy=fsdp", "model.id=x/llama-3.1-70b"],
    )
    kinds = {gpu["set"]["model.quantization"] for gpu in plan(config)["gpus"] if gpu["fits"]}
    assert kinds <= {"none"}
