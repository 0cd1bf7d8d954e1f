"""Reports: one self-contained page in which text of others stays text."""

import re
from pathlib import Path

from cases_product import regraded

HOSTILE = "<script>alert(1)</script> \u202etxt.exe\u2066 \x1b[31m {{ 7 * 7 }} \"' onload=x"


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    item = {
        "id": "x", "task": f"t:{HOSTILE}", "kind": "number", "group": HOSTILE,
        "messages": [{"role": "user", "content": HOSTILE}], "reference": "5",
        "choices": [HOSTILE], "majority": HOSTILE,
    }  # fmt: skip
    regraded(tmp_path / "eval", item, f"{HOSTILE} so it is 6")
    page = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert page.count(r"\u202etxt.exe\u2066 \x1b[31m {{ 7 * 7 }}") >= 4
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page)
    assert "<script" not in page
    assert "t:<wbr>&lt;script&gt;" in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not re.findall(r"(?:src|href)=", page)
