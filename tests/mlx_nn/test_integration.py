"""The code of docs/integration.md runs as written, from top to bottom."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integration.md").read_text()


def test_the_code_of_the_page_runs_from_top_to_bottom() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 12
    subprocess.run([sys.executable, "-W", "error", "-c", "".join(blocks)], check=True)


def test_what_the_page_names_is_there() -> None:
    import mhc_core.mlx

    (table,) = re.findall(r"\| you have \| use \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.DOTALL)
    names = re.findall(r"`(\w+)(?:\(\w+\))?`", table)
    assert {"HyperConnection", "accelerate", "MHCRewire"} <= set(names) <= set(mhc_core.mlx.__all__)
    for file in re.findall(r"`(examples/\w+\.py)`", PAGE):
        assert (ROOT / file).is_file()
    for file in re.findall(r"\]\(([\w-]+\.md)\)", PAGE):
        assert (ROOT / "docs" / file).is_file()
