"""The command ``mhc-mlx-bench``: ``mhc bench`` of the static layer, by mhc-mlx's options."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

ROWS = ("static_layer", "static_layer fwd+bwd")
MODES = ("throughput", "latency")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the static layer on every MLX backend that runs here."""
    asked = _parser().parse_args(arguments)
    words = [f"--{name}={getattr(asked, name)}" for name in ("B", "n", "C")]
    words += ["--T=1", "--vs=none", *(f"--row={row}" for row in ROWS)]
    words += [f"--backend={name}" for name in _backends()]
    words += [f"--dtypes={asked.dtypes}", f"--warmup={max(asked.warmup, 1)}"]
    words += [f"--repeats={asked.repeats}", f"--iters={asked.iters}"]
    for mode in [asked.mode] if asked.mode else MODES:
        _append(asked.out, _bench([*words, f"--mode={mode}"]))
    print(f"Done. Results written to {asked.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mhc-mlx-bench",
        description="mhc bench of the static layer, forward and with its gradients, by mhc-mlx's "
        "options. mhc bench itself measures more and compares with others.",
    )
    several = "; several, separated by commas"
    parser.add_argument("--mode", choices=MODES, help="both if left out")
    parser.add_argument("--B", default="1,8,32", help=f"the tokens{several}")
    parser.add_argument("--n", default="4,8,16,32", help=f"streams{several}")
    parser.add_argument("--C", default="256,512,1024,2048,4096", help=f"channels{several}")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32", help=f"dtypes{several}")
    parser.add_argument("--iters", type=int, default=200, help="calls in a turn")
    parser.add_argument("--warmup", type=int, default=10, help="calls before each turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument(
        "--out", type=Path, default=Path("results.jsonl"), help="the file to add lines of JSON to"
    )
    return parser


def _backends() -> list[str]:
    """Name the backends for MLX's arrays that run here and may be chosen unasked."""
    import mhc_core

    specs = [backend.spec for backend in mhc_core.backends().values() if backend.available]
    return [
        spec.name
        for spec in specs
        if spec is not None and spec.automatic and "mlx.core.array" in spec.array_types
    ]


def _bench(words: Sequence[str]) -> dict[str, Any]:
    """Run ``mhc bench`` and give its record."""
    from mhc_core.cli import app

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        status = app(["bench", *words, f"--json={file}"], prog_name="mhc", standalone_mode=False)
        if status:
            raise SystemExit(status)
        return json.loads(file.read_text(encoding="utf-8"))


def _append(file: Path, record: dict[str, Any]) -> None:
    """Add a line for each row, with what all of them have in common."""
    common = {name: record[name] for name in ("mode", "date", "machine", "versions", "repeats")}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        for row in record["rows"]:
            lines.write(json.dumps(common | row, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
