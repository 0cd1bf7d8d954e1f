"""What the recorded answers prove, and what a template may not do; all else is a frozen test."""

import shutil
from pathlib import Path

from tiny_release import built

from fintune.model import load_release, release_base
from fintune.releasing.verify import check_answers, make_golden_prompts
from fintune.untrusted import static
from fintune.untrusted.static import template_reaches


def test_answers_hold_over_precisions_and_no_release_loosens_its_own_tolerance() -> None:
    """Recorded in bf16 and verified in fp32 passes; named bf16 does not let other weights pass."""
    folder, base = built()
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


def test_sums_as_sha256sum_b_writes_them(tmp_path: Path) -> None:
    release = shutil.copytree(built()[0], tmp_path / "release")
    sums = release / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  ", " *"))
    assert " *adapter_model.safetensors\n" in sums.read_text()

    def checksums() -> str:
        found = {check.name: check.status for check in static.static_checks(release, "release")}
        return found["checksums"]

    assert checksums() == "ok"
    (release / "adapter_model.safetensors").write_bytes(b"x")
    assert checksums() == "failed"
