"""Ten broken releases, each refused by its own check, also where SHA256SUMS was written anew."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_release import built, rewrite_sums, tiny_base

from fintune.errors import GateRefused, OutputError
from fintune.model import Base, check_revision, load_release, open_release, release_base
from fintune.releasing.golden import check_answers, make_golden_prompts
from fintune.releasing.verify import verify

Folders = tuple[Path, Path]


@pytest.fixture(scope="module", name="built")
def _built() -> Folders:
    return built()


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def breaks(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return breaks


def _config(name: str, **values: object) -> Callable[[Path], None]:
    def breaks(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(tree))

    return breaks


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def _drop_key(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "v_proj.lora_B" in name)]


def _add_key(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight"] = torch.ones(4, 4)


def _flip_bit(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-997] ^= 0b0100_0000  # the top bit of a float32's exponent
    path.write_bytes(bytes(data))


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the pickle was opened')",)


def _pickle(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(pickle.dumps(_Bomb()))


def _template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("{{ ''.__class__.__mro__ }}" + path.read_text())


BROKEN = {
    "empty": (_tensors(dict.clear), "weights: empty"),
    "zero": (_tensors(_zero), "weights: every B matrix is zero"),
    "nan": (_tensors(_nan), "weights: NaN"),
    "other base": (
        _config("adapter_config.json", revision="f" * 64),
        "base: trained on another base",
    ),
    "missing key": (_tensors(_drop_key), "keys: missing key .*v_proj.lora_B"),
    "extra key": (_tensors(_add_key), "keys: extra key .*layers.9"),
    "pickle": (_pickle, "pickle: reading it can run code: optimizer.pt"),
    "auto_map": (
        _config("tokenizer_config.json", auto_map={"AutoTokenizer": ["x--y.Z", None]}),
        "code hooks: .*tokenizer_config.json: auto_map",
    ),
    "template": (_template, "template: reaches for __class__"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_release_is_refused_by_name(built: Folders, tmp_path: Path, name: str) -> None:
    folder, base = built
    breaks, message = BROKEN[name]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    breaks(copy)
    with pytest.raises(GateRefused, match="checksums: |pickle: "):
        verify(copy, base=base).settle()
    rewrite_sums(copy)
    with pytest.raises(GateRefused, match=message) as refused:
        verify(copy, base=base).settle()
    assert refused.value.exit_code == 3
    assert "checksums: " not in str(refused.value)


def test_one_bit_is_refused_by_checksum_and_by_answers(built: Folders, tmp_path: Path) -> None:
    folder, base = built
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    _flip_bit(copy)
    with pytest.raises(GateRefused, match="checksums: changed: adapter_model.safetensors"):
        verify(copy, base=base).settle()
    rewrite_sums(copy)
    with pytest.raises(GateRefused, match="answers: |weights: "):
        verify(copy, base=base).settle()


def test_other_base_of_the_same_shape_is_refused(built: Folders, tmp_path: Path) -> None:
    folder, _ = built
    other = tiny_base(tmp_path / "other", seed=5)
    with pytest.raises(GateRefused, match="base: trained on another base"):
        verify(folder, base=other).settle()
    with pytest.raises(GateRefused, match="base: trained on another base"):
        open_release(folder, other)


@pytest.mark.parametrize(
    ("adapter", "training", "found"),
    [
        ({"revision": "a" * 40}, {"provenance": {"base_sha256": "b" * 64}}, "a" * 40),
        ({"revision": None}, {"provenance": {"base_sha256": "b" * 64}}, "b" * 64),
        ({"revision": "b" * 64}, None, "b" * 64),  # releases of 0.2
        ({}, {"provenance": {}}, ""),
        ({"revision": 7}, {"provenance": [1]}, ""),
        ({}, None, ""),
    ],
)
def test_the_base_that_was_trained_on_is_read_from_where_it_stands(
    adapter: dict[str, object],
    training: dict[str, object] | None,
    found: str,
    tmp_path: Path,
) -> None:
    for name, tree in (("adapter_config", adapter), ("training_config", training)):
        if tree is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    (check,) = check_revision(tmp_path, Base("x/y", found or "c" * 40, tmp_path))
    assert check.status == ("ok" if found else "note"), check


def test_answers_hold_over_precisions_and_no_release_loosens_its_own_tolerance(
    built: Folders,
) -> None:
    """Recorded in bf16 and verified in fp32 passes; named bf16 does not let other weights pass."""
    folder, base = built
    found = release_base(folder, base)
    exact, coarse = (load_release(folder, found, dtype=name) for name in ("fp32", "bf16"))
    golden = make_golden_prompts(coarse)
    assert golden["decoding"]["dtype"] == "bf16"
    check = check_answers(golden, exact.model, "fp32")
    assert check.status == "ok", check.detail
    for row in golden["conversations"]:
        row["answer"]["logprobs"] = [value - 0.2 for value in row["answer"]["logprobs"]]
    check = check_answers(golden, exact.model, "fp32")
    assert check.status == "failed" and "in the mean" in check.detail


def test_template_walls() -> None:
    """What reaches out of a template is refused; what real templates use is not."""
    from fintune.untrusted.static import template_reaches

    bad = [
        "{{ x['__glo' 'bals__'] }}",
        "{{ x|attr('y') }}",
        "{{ x|map('attr', '__class__')|list }}",
        "{% include 'a' %}",
        "{%- from 'a' import b -%}",
        "{{ x._secret }}",
    ]
    assert [text for text in bad if not template_reaches(text)] == []
    good = "{% generation %}{{ m['content']|trim }}{% endgeneration %}{{ _x }} a __b__ {# __c__ #}"
    assert template_reaches(good) == ""


def test_foreign_release_without_our_files_is_read(built: Folders, tmp_path: Path) -> None:
    """A folder of peft alone: verified as far as it can be, the rest said as notes."""
    folder, base = built
    copy = tmp_path / "foreign"
    copy.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(folder / name, copy / name)
    (copy / "README.md").write_text("# An adapter of another tool\n")
    for path in base.glob("*token*"):
        shutil.copy(path, copy / path.name)
    report = verify(copy, base=base)
    notes = {check.name for check in report.checks if check.status == "note"}
    assert {"checksums", "provenance", "fixture", "template"} <= notes
    (copy / "training_args.bin").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(GateRefused, match="training_args.bin is a pickle"):
        verify(copy, base=base).settle()
    with pytest.raises(OutputError):
        verify(tmp_path / "absent")
