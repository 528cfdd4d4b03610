"""The table of the kernels: one line for each, with the work and the threads of its threadgroups.

``MHC_KERNEL_TUNING`` may name a JSON file that overrides parts of :data:`TABLE`::

    {"combine": {"threads": 128, "elements": 4}, "aggregate": {"iterations": 1}}
"""

from __future__ import annotations

import functools
import json
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

__all__ = ["MOST_THREADS", "REGISTERS", "SIMD", "TABLE", "VARIABLE", "Shape", "shape_of"]

VARIABLE = "MHC_KERNEL_TUNING"

SIMD = 32
# The most threads of a threadgroup. An Apple GPU refuses more than it has registers for: 384
# threads if each has the most, 256 registers of 16 bits (dougallj.github.io/applegpu/docs.html).
MOST_THREADS = {"metal": 256, "cuda": 1024}
REGISTERS = 64  # numbers of the streams that a thread may hold


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The entry of a kernel in the table.

    Attributes
    ----------
    groups
        The work of a threadgroup:

        - ``"tile"``: some channels of a token
        - ``"token"``: whole tokens, because it computes sums over C
        - ``"share"``: a share of the tokens, and the sums over them
        - ``"rows"``: a share of the rows to be summed
        - ``"matrices"``: [n, n] matrices of as many tokens as its lanes hold; a matrix takes n
          lanes, rounded up to a power of two
        - ``"split_k"``: a split of the channels, for tiles of 16 tokens in each simdgroup
        - ``"k_blocks"``: the same for one tile; its simdgroups share the split's K blocks
        - ``"k_block"``: a K block, 16 tokens and 8 columns in each simdgroup
        - ``"several"``: some tokens, with their partials and channels
        - ``"one"``: some channels of a token, with its sums of K blocks
        - ``"sums"``: some tokens, with their partials alone
        - ``"n_tiles"``: N tiles of 32 channels of a stream, one in each simdgroup, for a share of
          the tokens
        - ``"gated_splits"``: some tiles of 16 tokens, and a split of a stream or a whole stream;
          its simdgroups share the columns
        - ``"gated_columns"``: some columns of a token; its simdgroups share the streams
        - ``"gated_channels"``: 16 tokens and some channels; its simdgroups share the streams
        - ``"gated_pullback"``: the same, with as many channels whatever the tokens
        - ``"gated_factors"``: 32 channels of a stream in each simdgroup, for a share of the tokens
          and one of the columns
        - ``"slabs"``: some channels of all streams, 32 of one in each simdgroup, for a share of the
          tokens
        - ``"tiles"``: 16 tokens
        - ``"mixes"``: some numbers of the gradients of H_res and h_post
    threads
        The most threads of a threadgroup; fewer where there is less to do, and in Metal never more
        than MOST_THREADS.
    elements
        The most elements that a thread loads and stores at a time; fewer where C, the dtype or
        many streams require it.
    iterations
        How many such accesses a thread of a ``"tile"`` makes, if the GPU is busy anyway.
    numbers
        The most numbers of the streams that a thread holds at a time.
    keeps
        The number of stream arrays whose first accesses a thread keeps in registers between two
        uses.
    layers
        Whether those arrays are layers', as floats, and not streams.
    streams
        Whether the threads share the streams, not the channels alone.
    like
        The kernel whose threads and elements this one has too, so that both have equal sums.
    mixes
        Whether phi has columns for an H_res too, for a kernel of the fewest tokens.
    resident
        In CUDA, the threadgroups for which a multiprocessor must have registers, so that one
        computes while another waits.
    resident_float32
        The same for float32, if it differs.
    resident_tiles
        The same where a simdgroup has several tiles of columns, if it differs.
    resident_streams
        The numbers of streams for which ``resident`` holds; with others one threadgroup must fit.
    """

    groups: Literal[
        "tile",
        "token",
        "share",
        "rows",
        "matrices",
        "split_k",
        "k_blocks",
        "k_block",
        "several",
        "one",
        "sums",
        "n_tiles",
        "gated_splits",
        "gated_columns",
        "gated_channels",
        "gated_pullback",
        "gated_factors",
        "slabs",
        "tiles",
        "mixes",
    ]
    threads: int = 256
    elements: int = 8
    iterations: int = 2
    numbers: int = REGISTERS
    keeps: int = 0
    layers: bool = False
    streams: bool = False
    like: str = ""
    mixes: bool = True
    resident: int = 1
    resident_float32: int | None = None
    resident_tiles: int | None = None
    resident_streams: range = range(1, 33)


TABLE: Mapping[str, Shape] = {
    "aggregate": Shape(groups="tile"),
    "aggregate_vjp": Shape(groups="token"),
    "combine": Shape(groups="tile"),
    "combine_project": Shape(groups="split_k"),
    "combine_project_few": Shape(groups="k_blocks", resident=2, resident_float32=1),
    "combine_project_k_blocks": Shape(
        groups="k_block", threads=128, resident=3, resident_float32=3, resident_tiles=2
    ),
    "combine_vjp": Shape(
        groups="token",
        elements=4,
        numbers=16,
        resident=3,
        resident_float32=1,
        resident_streams=range(3, 5),
    ),
    "combine_vjp_wide": Shape(groups="token", elements=1, streams=True),
    "gated_collapse": Shape(groups="gated_channels"),
    "gated_collapse_vjp": Shape(groups="gated_pullback"),
    "gated_combine": Shape(groups="tile"),
    "gated_combine_vjp": Shape(groups="token", elements=4),
    "gated_dfactors": Shape(groups="gated_factors"),
    "gated_dlow": Shape(groups="gated_splits", threads=352),
    "gated_dx": Shape(groups="gated_pullback"),
    "gated_low": Shape(groups="gated_columns"),
    "gated_low_vjp": Shape(groups="token", elements=1),
    "gated_project": Shape(groups="gated_splits", threads=352),
    "head": Shape(groups="several"),
    "head_vjp": Shape(groups="matrices", threads=128),
    "mappings": Shape(groups="sums"),
    "mappings_unmixed": Shape(groups="sums"),
    "mappings_unmixed_vjp": Shape(groups="matrices", threads=128),
    "mappings_vjp": Shape(groups="matrices", threads=64),
    "pre": Shape(groups="several", resident=4),
    "pre_k_blocks": Shape(groups="one", threads=160),
    "pre_norm": Shape(groups="several", keeps=1, layers=True, resident=2),
    "pre_norm_k_blocks": Shape(groups="token", keeps=1, layers=True, like="pre_norm"),
    "pre_scale": Shape(groups="tile"),
    "pre_scale_vjp": Shape(groups="token"),
    "pre_unmixed": Shape(groups="several", resident=4),
    "pre_unmixed_k_blocks": Shape(groups="tile", threads=128),
    "project": Shape(groups="split_k"),
    "project_dphi": Shape(groups="n_tiles", resident=2, resident_float32=1),
    "project_dx": Shape(groups="n_tiles", iterations=4, resident=2),
    "project_few": Shape(groups="k_blocks", threads=512),
    "project_k_blocks": Shape(groups="k_block", threads=128, resident=4),
    "project_vjp": Shape(groups="slabs", resident=2),
    "project_unmixed_k_blocks": Shape(groups="k_block", threads=128, resident=4, mixes=False),
    "residual_add_aggregate": Shape(groups="tile"),
    "residual_add_aggregate_vjp": Shape(groups="token"),
    "rms_norm": Shape(groups="token", keeps=1),
    "rms_norm_vjp": Shape(groups="share", keeps=2),
    "sinkhorn": Shape(groups="matrices", threads=128),
    "sinkhorn_knopp": Shape(groups="matrices", threads=128),
    "sinkhorn_knopp_vjp": Shape(groups="matrices", threads=64),
    "sinkhorn_vjp": Shape(groups="matrices", threads=64),
    "static_layer": Shape(groups="token", keeps=1),
    "static_layer_vjp": Shape(groups="share", keeps=2),
    "static_layer_vjp_wide": Shape(groups="share", elements=1, streams=True),
    "static_mappings": Shape(groups="matrices", threads=128),
    "static_mappings_vjp": Shape(groups="matrices", threads=64),
    "sum_rows": Shape(groups="rows", elements=1),
    "sum_slabs": Shape(groups="mixes"),
    "vjp_tiles": Shape(groups="tiles"),
    "weights_norm_vjp": Shape(groups="share", keeps=2, layers=True),
    "weights_vjp": Shape(groups="token"),
    "write_project": Shape(groups="split_k"),
    "write_project_few": Shape(groups="k_blocks", threads=512),
    "write_project_k_blocks": Shape(groups="k_block", threads=128, resident=3, mixes=False),
    "write_streams": Shape(groups="tile"),
    "write_streams_vjp": Shape(groups="token"),
}
"""One line per kernel."""


# ---- tuning --------------------------------------------------------------------------------------


def shape_of(kernel: str, dialect: str) -> Shape:
    """Return a kernel's entry, with what the tuning file overrides and the dialect allows."""
    if kernel not in TABLE:
        raise ValueError(f"no kernel is named {kernel!r}; known are {', '.join(TABLE)}")
    path = os.environ.get(VARIABLE)
    shape = _tuned(path).get(kernel, TABLE[kernel]) if path else TABLE[kernel]
    if shape.like:
        other = shape_of(shape.like, dialect)
        shape = replace(shape, threads=other.threads, elements=other.elements)
    most = MOST_THREADS[dialect]
    return shape if shape.threads <= most else replace(shape, threads=most)


@functools.cache
def _tuned(path: str) -> dict[str, Shape]:
    """Read a tuning file, once; a wrong one raises ValueError with what is needed."""
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{VARIABLE}={path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f'{VARIABLE}={path}: needs an object such as {{"combine": {{...}}}}')
    entries: dict[str, Any] = content  # pyright: ignore[reportUnknownVariableType]
    return {kernel: _override(path, kernel, entry) for kernel, entry in entries.items()}


def _thread_count(value: int) -> bool:
    return value % SIMD == 0 and SIMD <= value <= max(MOST_THREADS.values())


def _power_of_two(value: int) -> bool:
    return 1 <= value <= 16 and value & (value - 1) == 0


_NEEDS: Mapping[str, tuple[Callable[[int], bool], str]] = {
    "threads": (_thread_count, f"a multiple of {SIMD} up to {max(MOST_THREADS.values())}"),
    "elements": (_power_of_two, "1, 2, 4, 8 or 16"),
    "iterations": (lambda value: value >= 1, "an integer of at least 1"),
    "resident": (lambda value: 1 <= value <= 16, "an integer from 1 to 16"),
}
_FIXED = {"groups", "numbers", "keeps", "layers", "streams", "like", "mixes"} | {
    f"resident_{what}" for what in ("float32", "tiles", "streams")
}
assert set(_NEEDS) | _FIXED == {field.name for field in fields(Shape)}


def _override(path: str, kernel: str, entry: Any) -> Shape:
    where = f"{VARIABLE}={path}: {reprlib.repr(kernel)}"
    if kernel not in TABLE:
        raise ValueError(f"{where} is no kernel; known are {', '.join(TABLE)}")
    if not isinstance(entry, dict):
        raise ValueError(
            f"{where} is {reprlib.repr(entry)}; needs an object with {', '.join(_NEEDS)}"
        )
    changes: dict[str, Any] = entry  # pyright: ignore[reportUnknownVariableType]
    own = {**_NEEDS}
    if TABLE[kernel].groups == "slabs":
        del own["threads"]  # a slab's simdgroups determine them
    for name, value in changes.items():
        if name not in own:
            raise ValueError(f"{where} has {reprlib.repr(name)}; known are {', '.join(own)}")
        good, need = _NEEDS[name]
        if type(value) is not int or not good(value):
            raise ValueError(f"{where}: {name} is {reprlib.repr(value)}; needs {need}")
    return replace(TABLE[kernel], **changes)
