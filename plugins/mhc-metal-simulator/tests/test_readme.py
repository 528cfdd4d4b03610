"""The example of the README does what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_example_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    shown = re.search(r"itself:\n\n```\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert shown is not None
    exec(code[1], {})
    assert capsys.readouterr().out == shown[1]
