"""Build the release folder from a finished run and its evaluation, if the gate allows it.

It is built in a staging folder that is renamed at the end (`files.staged_folder`). The same inputs
give the same bytes: no time stamp of the build, no order of a set, modes 0644. Only the names in
`untrusted/limits.toml` are written.
"""

import io
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import TrainingArguments

from fintune import __version__, console, files, model, page, seal
from fintune.config import LOCAL, Config
from fintune.errors import GateRefused, OutputError
from fintune.hub import COMMIT
from fintune.judgings import looks_dir, results_dir
from fintune.releasing.contents import (
    NOT_STATED,
    Acceptance,
    announced,
    first_evaluated,
    read_forms,
    shipped_rows,
)
from fintune.releasing.made import Made, of_others, of_run
from fintune.releasing.verify import make_golden_prompts
from fintune.sources import LICENCE
from fintune.untrusted import checks, static
from fintune.untrusted.checks import CARD, CONFIG, JUDGED, PROVENANCE, REPORT, RESULTS, RISK
from fintune.untrusted.probe import own_template

Json = dict[str, Any]
TOPICS = ("finance", "instruction-tuning")
"""Tags of what a run of ours was trained on."""
HELD_OUT, TASKS = "held-out rows", "questions of tasks"
"""What results are of where the rows are no single data set of the hub, or there are no rows."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank (its default is 16; a rank above it fails to load)."""
_PRIVATE_ARGUMENTS = re.compile(
    r"(^format|_dir|_path|run_name|token|hub_.*|push_to_hub.*|project|trackio.*|local_rank)$"
)
_LLAMA = re.compile(r"llama-?(\d(?:\.\d)?)", re.IGNORECASE)


class Told(NamedTuple):
    """What a release says that other stages know.

    Attributes:
        meanings: of the reasons for which rows were dropped.
        report: report.html of the evaluation, without questions unless `release.samples` is text.
    """

    meanings: dict[str, str]
    report: str | None


NOTHING = Told({}, None)


class Inputs(NamedTuple):
    """What a release is made of.

    Attributes:
        config: of this command.
        made: how the adapter was made.
        accepted: the reason given for publishing without the verdict `better`, and who gave it.
        told: what other stages say for the card.
        asked: run.json of the evaluation.
        judged: the judged file as it is released; None: not at all.
        rows: what the release holds of the data's rows.
        provenance: hashes that the release states.
        mismatches: where data, run and evaluation do not belong together.
        forms: by name what was found of the forms that it was also asked in.
    """

    config: Config
    base: model.Base
    made: Made
    results: Json
    asked: Json
    accepted: Acceptance
    told: Told
    judged: str | None
    rows: Json
    provenance: Json
    mismatches: list[str]
    forms: Json


def release(
    config: Config,
    *,
    fresh: bool = False,
    accept: str | None = None,
    told: Told = NOTHING,
    adapter: Path | None = None,
) -> Path:
    """Build `config.release_dir` from the finished data, run and evaluation folders.

    Args:
        fresh: replace an existing release, which is moved aside when the new one is complete.
        accept: reason to publish an adapter whose verdict is not `better`; printed on the card.
        told: what other stages say for the card.
        adapter: peft's folder of another trainer, in place of the run; it was evaluated.

    Returns:
        The release folder. An existing one of the same inputs is kept as it is.

    Raises:
        GateRefused: the adapter was not shown to be better, its evaluation rows were trained on,
            its weights are empty or not finite, or a file would name a local path.
        OutputError: an input is unfinished, or the folder holds another release.
    """
    inputs, final = _read_inputs(config, accept, told, adapter), config.release_dir
    with seal.lock(final):
        if not seal.empty(final):
            seal.check_ours(final)
            if not fresh:
                return _keep(final, inputs)
        _gate(inputs)
        inputs.accepted.record()
        console.heading(f"release {config.name}")
        aside = lambda: seal.move_aside(final)  # noqa: E731
        with files.staged_folder(final, published=True, free=aside) as staging:
            _build(staging, inputs)
            report = checks.Report(final)
            report.run(lambda: static.static_checks(staging, "release"))
            report.run(lambda: [static.check_paths(staging, _private(inputs))])
            report.run(lambda: model.check_on_base(staging, inputs.base))
            report.settle()
    console.say(announced(files.read_json(final / CONFIG)))
    console.say(f"released: {final}")
    return final


def _read_inputs(config: Config, accept: str | None, told: Told, adapter: Path | None) -> Inputs:
    """Read the finished folders.

    Raises:
        OutputError: one is absent, unfinished or changed since.
    """
    evaluation, found = config.eval_dir, results_dir(config)
    needed = (RESULTS, JUDGED, "run.json")
    base = model.find_base(config.model, kept_in=() if adapter else [config.run_dir])
    made = of_others(config, base, adapter) if adapter else of_run(config, base)
    tested = seal.read_seal(evaluation, stage="evaluation", make="fintune eval", needed=needed)
    judged = tested
    if found != evaluation:
        judged = seal.read_seal(found, stage="judging", make="fintune judge", needed=needed)
    results = files.read_json(found / RESULTS)
    provenance = {
        "adapter_sha256": made.tested["adapter"][0],
        "test_results_sha256": judged["files"][RESULTS]["sha256"],
        "release": config.release.model_dump(mode="json", exclude={"out"}),
        "trained_on": made.environment.get("finished"),
        "evaluated_on": first_evaluated(looks_dir(config), tested["inputs_sha256"]),
    }
    if made.ours:
        manifest = config.data_dir / "manifest.json"
        provenance["manifest_sha256"] = files.sha256_file(manifest)
    accepted = Acceptance.of(found, accept, provenance["test_results_sha256"])
    provenance |= accepted.facts
    text, rows = shipped_rows(found, config, judged=bool(results.get("judge")))
    if text is not None:
        provenance["judged_sha256"] = files.sha256_bytes(text.encode())
    provenance["base"] = base.about
    if model.WEIGHTS.fullmatch(base.revision):
        provenance |= {"base_sha256": base.revision, "base_read_as": base.read_as}
    of_eval, clean = tested["inputs"], results["n"]["contaminated"] == 0
    of_eval = of_eval | {"adapter_config": of_eval.get("subject", {}).get("adapter_config")}
    wrong = [said for key, (now, said) in made.tested.items() if of_eval.get(key) != now]
    wrong += [] if clean else ["evaluation counts contaminated test rows"]
    mismatches = [f"the {reason}" for reason in (*made.mismatches, *wrong)]
    asked = files.read_json(evaluation / "run.json")
    known: tuple[Any, ...] = (config, base, made, results, asked, accepted, told)
    forms = read_forms(evaluation, tested["files"]["predictions.jsonl"]["sha256"])
    if forms:
        provenance["forms"] = {name: files.sha256_json(form) for name, form in forms.items()}
    more: tuple[Any, ...] = (text, rows, provenance, mismatches, forms)
    return Inputs(*known, *more)


def _gate(inputs: Inputs) -> None:
    """Refuse to release where the evaluation does not allow it, with every reason.

    Raises:
        GateRefused: the verdict is not `better` and none was accepted, the folders do not belong
            together, test rows were trained on, or the adapter is empty or not finite.
    """
    reason = inputs.accepted.reason
    if reason is not None and not reason.strip():
        raise GateRefused("--accept needs a reason", why="the card prints it for every reader")
    weights = static.check_weights(inputs.made.folder)
    failed = [weights.detail] if weights.status == "failed" else []
    verdict = inputs.results.get("verdict")
    unproved = verdict != "better" and reason is None
    why = "".join(f" ({reason})" for reason in inputs.results.get("invalid_reasons") or ())
    reasons = [f"the verdict is {verdict!r}{why}, not 'better'"] if unproved else []
    if reasons := [*reasons, *inputs.mismatches, *failed]:
        fix = 'a verdict may be accepted with a reason: --accept "..." (the card prints it);'
        fix += " for anything else train or evaluate again"
        raise GateRefused("not released: " + "; ".join(reasons), fix=fix)


def _keep(final: Path, inputs: Inputs) -> Path:
    """Keep an existing release of the same inputs.

    Raises:
        OutputError: it is of other inputs. GateRefused: it was changed.
    """
    old = files.read_json(final / CONFIG) if (final / CONFIG).is_file() else {}
    if differing := seal.differences(old.get(PROVENANCE, {}), inputs.provenance):
        what = f"{final} holds the release of other inputs; these differ: {'; '.join(differing)}"
        fix = "choose another folder (--set release.out=...), or --fresh (moves it aside)"
        raise OutputError(what, fix=fix)
    static.open_folder(final, "release")
    console.say(announced(old))
    console.say(f"released already, unchanged: {final}")
    return final


def _build(staging: Path, inputs: Inputs) -> None:
    """Write every file of the release; SHA256SUMS last."""
    config, base, made = inputs.config, inputs.base, inputs.made
    files.copy_file(made.folder / checks.ADAPTER, staging / checks.ADAPTER)
    # peft asks the hub for `revision`, so only a commit may stand there.
    revision = base.revision if COMMIT.fullmatch(base.revision) else None
    named = {"base_model_name_or_path": base.id, "revision": revision, "inference_mode": True}
    tree = files.read_json(made.folder / checks.ADAPTER_CONFIG) | named
    tree.pop("auto_mapping", None)  # a class to import, which nothing here reads
    _write_json(staging / checks.ADAPTER_CONFIG, tree)
    tokenizer = model.load_tokenizer(base)
    if not made.ours:
        tokenizer.chat_template = own_template(made.folder) or tokenizer.chat_template
    _write_tokenizer(tokenizer, staging)
    kept = {k: v for k, v in made.arguments.items() if not _PRIVATE_ARGUMENTS.search(k)}
    if config.release.training_args_bin and made.ours:
        files.write_bytes(staging / checks.TRAINING_ARGS, _pickled(kept))
    files.copy_file(results_dir(config) / RESULTS, staging / RESULTS)
    for name, text in ((JUDGED, inputs.judged), (REPORT, inputs.told.report)):
        if text is not None:
            files.write_text(staging / name, text)
    settings = model.prepared_chat(config.data_dir, made.recipe.chat)
    loaded = model.load_release(staging, base, settings=settings)
    judged = files.read_jsonl(staging / JUDGED) if inputs.judged else ()
    held_out = [(row["question"], row["reference"]) for row in judged if row.get("question")]
    files.write_json(staging / checks.FIXTURE, make_golden_prompts(loaded, held_out))
    llama = _write_llama_license(staging, base)
    values = _card_values(inputs, llama)
    if made.ours:
        settings_text = page.render("settings.yaml.jinja", **values)
        files.write_text(staging / checks.SETTINGS, settings_text + "\n")
    files.write_text(staging / RISK, page.render("model_risk.md.jinja", **values) + "\n")
    facts = {
        "fintune": __version__,
        "config": _without_paths(made.recipe.model_dump(mode="json")) if made.ours else NOT_STATED,
        "rows_of_the_data": inputs.rows,
        "training_arguments": _without_paths(kept) if made.ours else NOT_STATED,
        PROVENANCE: inputs.provenance,
        "files": {path.name: files.sha256_file(path) for path in sorted(staging.iterdir())},
    }
    files.write_json(staging / CONFIG, facts)
    card = write_card(inputs, files.sha256_file(staging / CONFIG), values)
    files.write_text(staging / CARD, card)
    sums = [f"{files.sha256_file(path)}  {path.name}\n" for path in sorted(staging.iterdir())]
    files.write_text(staging / checks.SUMS, "".join(sums))


def _write_tokenizer(tokenizer: Any, staging: Path) -> None:
    """Write the tokenizer's files, and a special_tokens_map.json that agrees with them.

    transformers 5 no longer writes the map, but older loaders read it. The class has the name that
    transformers 4 and 5 know; 5 would write TokenizersBackend.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in ("tokenizer.json", checks.TEMPLATE):
            files.copy_file(Path(folder) / name, staging / name)
        tree = files.read_json(Path(folder) / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "name_or_path", "backend"):
        tree.pop(key, None)
    tree["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(staging / "tokenizer_config.json", tree)
    _write_json(staging / "special_tokens_map.json", dict(tokenizer.special_tokens_map))


def _without_paths(value: Any, left_out: tuple[str, ...] = ("out", "path")) -> Any:
    """The same tree without folders; of a file's path the last part is kept."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key not in left_out}
        return {key: _without_paths(part, left_out) for key, part in kept.items()}
    if isinstance(value, list):
        return [_without_paths(part, left_out) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return Path(value).name
    return value


def _pickled(arguments: Json) -> bytes:
    """The bytes of training_args.bin, pickled as by the Trainer; it is never read here."""
    fields = TrainingArguments.__dataclass_fields__
    known = {k: v for k, v in arguments.items() if k in fields and v is not None}
    # transformers would take an absent disable_tqdm from this process's log level.
    fixed = {"output_dir": ".", "report_to": [], "use_cpu": True}
    fresh = TrainingArguments(**{"disable_tqdm": False} | known | fixed)
    fresh.use_cpu = bool(arguments.get("use_cpu", False))
    # A pickle writes a string once for each object that holds it, so equal strings must be one.
    vars(fresh).update({k: sys.intern(v) for k, v in vars(fresh).items() if type(v) is str})
    buffer = io.BytesIO()
    torch.save(fresh, buffer)
    return buffer.getvalue()


def _write_llama_license(staging: Path, base: model.Base) -> str | None:
    """LICENSE and NOTICE of a Llama base beside its adapter; its version, or None for others."""
    match = _LLAMA.search(base.id)
    if match is None:
        return None
    license_file = min(base.folder.glob("LICENSE*"), default=None)
    if license_file is None:
        what = f"{base.folder} holds no licence text of {base.id}"
        why = "Llama's licence asks for a copy of itself with everything derived from it"
        raise GateRefused(what, why=why, fix=f"put the base's LICENSE into {base.folder}")
    files.copy_file(license_file, staging / "LICENSE")
    # The attribution that section 1.b.iii of the Llama 3 licences requires.
    files.write_text(staging / "NOTICE", page.render("NOTICE.jinja", llama=match[1]) + "\n")
    return match[1]


def write_card(inputs: Inputs, config_sha256: str, values: Json) -> str:
    """README.md of a release: `templates/card.md.jinja`, filled with what the run's files say.

    What no file says is "not stated" there, what nobody looked at "not checked". The metadata block
    goes through huggingface_hub's ModelCardData, so that the hub reads it.

    Args:
        config_sha256: of training_config.json, which names the hashes of the other files.
        values: of the templates (`_card_values`).
    """
    base, made = inputs.base, inputs.made
    english = made.recipe.data.filter_english_only
    tags = ["lora", *TOPICS, "transformers", "adapter"] if made.ours else ["lora", "transformers"]
    stated = made.manifest.get("sources", {})
    sources = {name: facts["identity"] for name, facts in stated.items()}
    of_hub = {name: commit for name, commit in sources.items() if COMMIT.fullmatch(commit)}
    asked = HELD_OUT if inputs.results["loss"].get("tokens", 1) else TASKS
    data, commit = [*of_hub.items()][0] if len(of_hub) == len(sources) == 1 else (asked, None)
    measured: Any = partial(EvalResult, "text-generation", data, data)
    of_test = partial(measured, dataset_split="test", dataset_revision=commit)
    parts = {name: inputs.results.get(name) or {} for name in ("loss", "accuracy")}
    metadata = ModelCardData(
        base_model=base.id,
        base_model_relation="adapter",
        language="en" if english else None,
        library_name="peft",
        pipeline_tag="text-generation",
        license=values["license"],
        datasets=sorted({name.partition("#")[0] for name in of_hub}) or None,
        tags=[*tags, "english"] if english else tags,
        model_name=values["name"],
        eval_results=[
            of_test(k, v["adapter"]) for k, v in parts.items() if v.get("adapter") is not None
        ],
    )
    more = {"metadata": metadata.to_yaml(), "config_sha256": config_sha256}
    return page.render("card.md.jinja", **values, **more) + "\n"


def _card_values(inputs: Inputs, llama: str | None) -> Json:
    """What the templates of card, model_risk.md and fintune.yaml are filled with.

    Args:
        llama: version of a Llama base, whose licence has duties; None for any other base.
    """
    made, base, name = inputs.made, inputs.base, inputs.config.name
    config = made.recipe
    if llama and not name.lower().startswith("llama"):
        name = f"Llama {name}"  # as the base's licence asks
    chat = made.manifest.get("chat") or {"variables": {"date_string": config.chat.date_string}}
    variables = {
        name: json.dumps(value) if isinstance(value, str) else repr(value)
        for name, value in chat["variables"].items()
    }
    about = base.folder / CARD
    text = about.read_text("utf-8", "replace") if about.is_file() else ""
    stated = LICENCE.search(text.partition("\n---")[0])
    of_llama = f"llama{llama}" if llama else None
    tree = _without_paths(config.model_dump(mode="json"), ("out",)) | {"name": inputs.config.name}
    return {
        **inputs._asdict(),
        **made._asdict(),
        "config": config,
        "stated": inputs.config.release,
        "version": __version__,
        "settings": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip(),
        "contains": announced({"rows_of_the_data": inputs.rows}).replace("your", "its"),
        "license": inputs.config.release.license or of_llama,
        "base_license": of_llama or (stated and stated[1]),
        "variables": variables,
        "name": name,
        "adapter": name.replace(" ", "-"),
        "llama": llama,
        "local": config.model.path is not None and base.id.startswith(LOCAL),
        "commit": base.revision if COMMIT.fullmatch(base.revision) else None,
        "vllm_rank": vllm_rank(config.train.lora.r),
    }


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds an adapter's rank."""
    return next((value for value in VLLM_RANKS if value >= rank), VLLM_RANKS[-1])


def _private(inputs: Inputs) -> list[str]:
    """Absolute folders of this machine that no published file may contain."""
    folders = [*inputs.config.folders().values(), inputs.base.folder, Path.cwd(), Path.home()]
    texts = {str(folder.resolve()) for folder in folders}
    return sorted(text for text in texts if text.count("/") > 1)


def _write_json(path: Path, tree: Json) -> None:
    """JSON of a foreign format (peft, transformers): without our format number."""
    files.write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
