"""Write tests/data/NAME.{json,npz}: a compact choice of golden cases.

    python tests/make_golden_subset.py --golden DIR
    python tests/make_golden_subset.py --golden DIR --name families --groups glm xing hyv4 qwen4
    python tests/make_golden_subset.py --golden DIR --name mixers --groups GROUP...

Cases are taken smallest first until the budget is spent, after those in WANTED, each of which is
the only one to cover something. Equal arrays are stored once. All arrays of a dtype lie in one
long array, since a zip entry for each would outweigh them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# bytes of the source files, which dedupe to less; the results are under 1 MB and under 0.5 MB
BUDGETS = {"golden": 1_200_000, "families": 560_000, "mixers": 400_000}
WANTED = {
    "sk_colrow_l1_rand_n32_t20__lucidrains_v2__f64": "n = 32",
    "v4pre_bf16_C64__mlx_lm_v41__bf16": "pre in bf16",
    "v4post_bf16_C64__tilekernels_ref__bf16": "combine in bf16",
    "ml_layer_bf16_n4C64__mhc_mlx__bf16": "static_layer in bf16",
    "v4stack_bf16_sub4_B1S4n2C8__tilekernels_ref__bf16": "a chain in bf16",
    "v4prenormw_n4C16__tilekernels_ref__f64": "norm weight, post_scale 1",
    "v41stack_sub2_B1S4n4C8__mlx_lm_v41__f64": "V4.1",
    "v4model_sub4_B1S4n4C5__transformers__f64": "four sublayers at n = 4",
    "mg_model_sub4_C5__megatron__f64": "contract",
    "ml_addagg__mhc_mlx__f64": "residual_add_aggregate",
    "ml_rewire_linear_D32n4__mhc_mlx__f64": "gated_combine around a linear layer",
    "ml_rewire_qlinear4_D64n8__mhc_mlx__f32": "gated_combine at n = 8",
    "l2_B2S4n4C8_base__lucidrains_v2__f64": "several sequences, streams inside",
    "l1_B2S4n4C8_base__lucidrains_v1__f64": "several sequences, streams in the batch",
}
# Computed by none of our ops, not even in part: see the table in test_golden.py.
UNREACHED = {"sinkhorn.rowcol_addeps"}
KEPT = ("id", "variant", "impl", "precision", "attrs", "differentiable", "notes")
FLAGS = ("nonfinite_arrays", "f32_native_nonfinite", "ill_conditioned_f32")
ABOUT = ("dtype", "kind", "atol_f64", "atol_f32", "atol_bf16")


class Pool:
    """Long arrays, one for each dtype, and where each distinct array lies in them."""

    def __init__(self) -> None:
        self.parts: dict[str, list[NDArray[Any]]] = {}
        self.known: dict[tuple[str, bytes], int] = {}
        self.ends: dict[str, int] = {}

    def place(self, array: NDArray[Any]) -> tuple[str, int, list[int]]:
        dtype = array.dtype.name
        key = (dtype, array.tobytes())
        if key not in self.known:
            self.known[key] = self.ends.get(dtype, 0)
            self.ends[dtype] = self.known[key] + array.size
            self.parts.setdefault(dtype, []).append(array.ravel())
        return dtype, self.known[key], list(array.shape)

    def long(self) -> dict[str, NDArray[Any]]:
        return {dtype: np.concatenate(parts) for dtype, parts in self.parts.items()}


def choose(records: list[dict[str, Any]], golden: Path, budget: int) -> list[dict[str, Any]]:
    size = {record["id"]: (golden / record["file"]).stat().st_size for record in records}
    reached = [record for record in records if record["variant"] not in UNREACHED]
    first = {r["variant"]: r["id"] for r in sorted(reached, key=lambda r: -size[r["id"]])}
    wanted = {*WANTED, *first.values()}  # the smallest of each variant is there in any case
    order = sorted(reached, key=lambda r: (r["id"] not in wanted, size[r["id"]], r["id"]))
    ends = np.cumsum([size[record["id"]] for record in order])
    return sorted(
        (record for record, end in zip(order, ends, strict=True) if end <= budget),
        key=lambda r: r["id"],
    )


def compact(record: dict[str, Any], golden: Path, pool: Pool, formulas: dict[str, str]) -> Any:
    kept = {key: record[key] for key in KEPT if key in record}
    kept |= {key: record[key] for key in FLAGS if record.get(key)}
    if record["formula"] != formulas[record["variant"]]:
        kept["formula"] = record["formula"]
    with np.load(golden / record["file"]) as stored:
        kept["arrays"] = {
            key: {"at": pool.place(stored[key])} | {k: about[k] for k in ABOUT if k in about}
            for key, about in record["arrays"].items()
        }
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose golden cases for the repository.")
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--name", choices=BUDGETS, default="golden")
    parser.add_argument(
        "--groups", nargs="*", help="variants whose names begin so; all if left out"
    )
    parser.add_argument("--into", type=Path, default=Path(__file__).parent / "data")
    options = parser.parse_args()
    index = json.loads((options.golden / "index.json").read_text())
    groups = options.groups or {record["variant"].split(".")[0] for record in index["cases"]}
    given = [r for r in index["cases"] if r["variant"].split(".")[0] in groups]
    chosen = choose(given, options.golden, BUDGETS[options.name])
    variants = {record["variant"] for record in chosen}
    missing = {record["variant"] for record in given} - variants - UNREACHED
    if missing:
        raise SystemExit(f"the budget leaves no case of {', '.join(sorted(missing))}")
    (tolerance,) = {json.dumps(record["tol"], sort_keys=True) for record in given}
    pool = Pool()
    written = {
        "versions": index["versions"],
        "tolerance": json.loads(tolerance),
        "formulas": {key: index["formulas"][key] for key in sorted(variants)},
        "cases": [compact(record, options.golden, pool, index["formulas"]) for record in chosen],
    }
    options.into.mkdir(exist_ok=True)
    lines = json.dumps(written, separators=(",", ":")).replace('{"id":', '\n{"id":')
    (options.into / f"{options.name}.json").write_text(lines + "\n")
    np.savez_compressed(options.into / f"{options.name}.npz", **pool.long())
    print(f"{len(chosen)} of {len(index['cases'])} cases")


if __name__ == "__main__":
    main()
