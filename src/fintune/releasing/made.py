"""How a released adapter was made: by a run of ours, or by another trainer."""

from pathlib import Path
from typing import Any, NamedTuple

from fintune import files, model, seal
from fintune.config import Config, LoraConfig, load_config
from fintune.errors import failing
from fintune.judgings import prepared
from fintune.untrusted import checks, static

Json = dict[str, Any]
RUN_FILES = ("config.yaml", "environment.json", "training_arguments.json")


class Made(NamedTuple):
    """How the adapter was made, as far as it is known.

    Attributes:
        folder: of the adapter.
        recipe: of the training run; of an adapter of others only its shape and base count.
        manifest: of the prepared data, and `environment`, of the training: {} where not known.
        arguments: transformers' effective TrainingArguments, {} where not known.
        mismatches: where run and data do not belong together.
        tested: what an evaluation of it has among its inputs, and how it is told if not.
        ours: it is of a training run of ours.
    """

    folder: Path
    recipe: Config
    manifest: Json
    environment: Json
    arguments: Json
    mismatches: list[str]
    tested: dict[str, tuple[Any, str]]
    ours: bool


def of_run(config: Config, base: model.Base) -> Made:
    """The best adapter of a finished run. Raises OutputError: run or data are unfinished."""
    run, adapter = config.run_dir, f"best/{checks.ADAPTER}"
    data = seal.read_data(config.data_dir)
    trained = seal.read_seal(
        run, stage="training run", make="fintune train", needed=(adapter, *RUN_FILES)
    )
    recipe, environment, arguments = (run / name for name in RUN_FILES)
    train, test = (data["files"][f"{name}.parquet"]["sha256"] for name in ("train", "test"))
    inputs = trained["inputs"]
    compared = (
        ("run was trained on other data", inputs["data"]["train.parquet"], train),
        ("run was trained on another base", inputs["base"]["revision"], base.revision),
    )
    tested = {
        "adapter": (trained["files"][adapter]["sha256"], "evaluation is of another adapter"),
        "train": (train, "evaluation compared with other training rows"),
        "test": (test, "evaluation decided by other rows"),
    }
    paths = (config.data_dir / "manifest.json", environment, arguments)
    manifest, trained_by, arguments_of = map(files.read_json, paths)
    wrong = [reason for reason, stated, actual in compared if stated != actual]
    known = (load_config(recipe), manifest, trained_by, arguments_of)
    return Made(run / "best", *known, wrong, tested, ours=True)


def of_others(config: Config, base: model.Base, folder: Path) -> Made:
    """An adapter of another trainer: of its training nothing is known but the adapter's shape.

    Raises:
        GateRefused: no adapter is there, or a check of its files failed.
    """
    static.open_folder(folder, "adapter")
    stated = checks.read_object(folder, checks.ADAPTER_CONFIG)
    shape = {key: stated[key] for key in LoraConfig.model_fields if stated.get(key) is not None}
    if isinstance(names := shape.get("target_modules"), list):  # by their ends, as peft reads them
        shape["target_modules"] = sorted({str(name).rpartition(".")[2] for name in names})
    with failing(f"{checks.ADAPTER_CONFIG} has no shape of an adapter", ValueError):
        lora = LoraConfig.model_validate(shape)
    train = config.train.model_copy(update={"lora": lora})
    data = config.data.model_copy(update={"filter_english_only": False})
    weights, settings = (
        files.sha256_file(folder / name) for name in (checks.ADAPTER, checks.ADAPTER_CONFIG)
    )
    rows = prepared(config)
    test = rows and seal.read_data(rows)["files"]["test.parquet"]["sha256"]
    tested = {
        "adapter": (weights, "evaluation is of another adapter"),
        "adapter_config": (settings, "evaluation is of it under another adapter_config.json"),
        "base_revision": (base.revision, "evaluation is of another base"),
        "test": (test, "evaluation is of other prepared rows, which --data names"),
    }
    recipe = config.model_copy(update={"train": train, "data": data})
    return Made(folder, recipe, {}, {}, {}, [], tested, ours=False)
