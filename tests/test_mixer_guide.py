"""docs/mixers.md, followed to the letter in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "mixers.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(
    re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
)
EXAMPLE = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]
# the slow ones: a mixer runs on them as the others do
WITHOUT = "jax,mlx-metal-simulator,simulator,metal-simulator"


def test_the_example_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    exec(EXAMPLE, {})
    assert f"# {capsys.readouterr().out.strip()}" in EXAMPLE


def test_a_mixer_of_ones_own_passes_the_kit_and_runs(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the plugin's build backend: pip install hatchling")
    assert set(FILES) == {"pyproject.toml", "mhc_mean/__init__.py", "test_mean.py"}
    site = tmp_path / "site"
    for name, text in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    left = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "MHC_"))}
    paths = filter(None, (str(site), os.environ.get("PYTHONPATH")))
    environment = {**left, "PYTHONPATH": os.pathsep.join(paths), "MHC_DISABLE_PLUGINS": WITHOUT}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "folder",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = ("-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "--target", str(site), ".")
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mean.py")
    assert re.search(r"[5-9]\d* passed|\d\d+ passed", said)
    assert "skipped" not in said
    run(
        "-c",
        "import mhc_core as mhc\n"
        "variant = mhc.Variant(mixer='mean')\n"
        "assert (variant.columns(4), 'mean' in mhc.mixers()) == (9, True)\n",
    )
