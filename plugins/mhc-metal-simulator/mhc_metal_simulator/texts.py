"""``python -m mhc_metal_simulator.texts FOLDER``: every text that Apple's compiler would get.

The ops of ``mlx-metal`` run on arrays without values, at sizes that cover every kernel, every
number of streams that changes a kernel's code, and every dtype. Each launch is traced (capture.py)
and not run. MLX passes its own utilities and then this text to Apple's compiler
(``mlx/backend/metal/custom_kernel.cpp``: ``metal::utils() + source``), so each file begins with the
headers that make those utilities, from the installed MLX.

PyTorch gets functions of their own (``mhc_backends/kernels/metal_function.py``), without those
utilities. Of these there is one for each kernel, number of streams and dtype, as only the lines
around the body differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mhc_backends.kernels import KERNELS
from mhc_backends.kernels.functions import Ops
from mhc_backends.kernels.metal_function import written
from mhc_backends.kernels.mlx import Kernels, dtype_name
from mhc_backends.kernels.ops import OPS
from mhc_backends.mlx_common import filled
from mhc_conformance.cases import PROJECTED_OR_MIXED, STATICS, Sizes, rank_of
from mhc_conformance.subject import several
from mhc_core import HY_V4, math
from mhc_core.signature import Op, signature

from mhc_metal_simulator.capture import capture_source
from mhc_metal_simulator.headers import utilities

__all__ = ["DTYPES", "STREAMS", "Text", "complete", "texts"]

DTYPES = ("float32", "float16", "bfloat16")
STREAMS = (1, 2, 3, 4, 5, 8, 9, 32)
"""The numbers of streams: a power of two or not, and past each limit of launch.py and the ops.

With one stream there are no sums over streams; up to 4 streams are kept in registers; up to 7 have
all of their mappings in one pass over phi; a matrix takes n lanes, rounded up to a power of two.
"""

Library = Literal["mlx", "torch"]

_Size = tuple[tuple[int], int]  # the leading axes and the channels

_SIZES: tuple[_Size, ...] = (
    ((1,), 4096),  # few tokens, so that some inputs are in constant memory
    ((100_000,), 4096),
    ((1,), 1),  # streams may be in constant memory, too
    ((7,), 37),
)


@dataclass(frozen=True)
class Text:
    """The text of one launch, as MLX prints it or PyTorch gets it, and where it came from."""

    kernel: str  # the name of its body
    name: str  # of its file, without suffix: no two texts have the same
    n: int
    dtype: str
    text: str
    library: Library = "mlx"


# ---- launches ------------------------------------------------------------------------------------

_NUMBERS = re.compile(r"(?<== \{)[-+.\de, finf]*(?=\};)")
_Trace = Callable[[], str]


class _Recorder:
    """A stand-in for MLX that records how to trace each kind of launch, once."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.known: set[Any] = set()
        self.new: list[tuple[str, _Trace]] = []

    def __call__(self, **about: Any) -> Callable[..., list[mx.array]]:
        kernel: Any = mx.fast.metal_kernel(**about)

        def launch(*, inputs: Sequence[mx.array], **static: Any) -> list[mx.array]:
            shapes = [(a.shape, a.dtype) for a in inputs]
            spaces = [(a.dtype, a.ndim == 0, a.size < 8) for a in inputs]
            # a variant's numbers and the values of template arguments do not change the text
            source = _NUMBERS.sub("", about["source"])
            values: dict[str, Any] = dict(static["template"] or ())
            words = (spaces, tuple(values), values.get("N"), static["output_dtypes"])
            key = (about["header"], source, repr(words))

            def trace() -> str:
                if self._library == "torch":
                    return _function(about, inputs, static)
                return capture_source(
                    lambda *zeros: kernel(inputs=list(zeros), verbose=True, **static), shapes
                )

            if key not in self.known:
                self.known.add(key)
                self.new.append((about["name"], trace))
            outputs = zip(static["output_shapes"], static["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in outputs]

        return launch


def _function(about: dict[str, Any], inputs: Sequence[mx.array], static: dict[str, Any]) -> str:
    """Return the function that PyTorch gets for a launch of MLX's."""
    names, made = about["input_names"], about["output_names"]
    dtypes = [dtype_name(array.dtype) for array in inputs], map(dtype_name, static["output_dtypes"])
    groups = [
        tuple(zip(group, dtype, strict=True))
        for group, dtype in zip((names, made), dtypes, strict=True)
    ]
    return written(about["header"], about["source"], tuple(static["template"]), *groups).text


def texts(
    streams: Iterable[int] = STREAMS,
    dtypes: Iterable[str] = DTYPES,
    every: bool = True,
    library: Library = "mlx",
) -> Iterator[Text]:
    """Return every text once; with ``every`` false, one for each kernel, n and dtype."""
    recorder = _Recorder(library)
    count: Counter[tuple[str, int, str]] = Counter()
    for n, dtype in itertools.product(streams, dtypes):
        ops = Ops(Kernels(recorder, "metal"))
        for op in OPS:
            _run(ops, op, n, dtype, _SIZES if every else _SIZES[:2])
        for name, trace in recorder.new:
            kernel = max((k for k in KERNELS if name.startswith(f"mhc_{k}_")), key=len)
            kind = (kernel, n, dtype)
            if every or kind not in count:
                count[kind] += 1
                full = f"{kernel}-n{n}-{dtype}-{count[kind]}" + "-torch" * (library == "torch")
                yield Text(kernel, full, n, dtype, trace(), library)
        recorder.new.clear()


def _run(ops: Any, op: str, n: int, dtype: str, sizes: Sequence[_Size]) -> None:
    """Call an op and its vjp in these sizes, and in the first with all of its static arguments.

    An op that may mix streams is called without H_res too.
    """
    declared = math.load(op).OP
    statics = [dict(static) for _, static in STATICS.get(op) or [("", ())]]
    if op == "expand":
        statics = [{"n": n}]
    mixing = [(static, True) for static in statics]
    alone: dict[str, Any] = {"variant": HY_V4} if declared.projects else {}
    unmixing = [(alone, False)] if op in PROJECTED_OR_MIXED else []
    for leading, C in sizes:
        first = (leading, C) == sizes[0]
        for static, mixes in (*(mixing if first else mixing[:1]), *unmixing):
            placed = _zeros(declared, Sizes(leading, n, C, ""), dtype, static, mixes)
            primals = [one for one in placed if one is not None]
            call = signature(lambda op: math.load(op).OP, op, placed, static)
            cotangents = [
                mx.zeros(shape, getattr(mx, name))
                for shape, name in zip(call.output_shapes, call.output_dtypes, strict=True)
            ]

            there = [one is not None for one in placed]

            def function(
                *arrays: mx.array,
                op: str = op,
                static: dict[str, Any] = static,
                there: Sequence[bool] = there,
            ) -> list[mx.array]:
                outputs: Any = getattr(ops, op)(*filled(arrays, there), **static)
                return [one for one in several(outputs) if one is not None]

            mx.vjp(function, primals, cotangents)


def _zeros(
    op: Op, sizes: Sizes, dtype: str, static: dict[str, Any], mixes: bool
) -> list[mx.array | None]:
    """Return arrays without values: none is ever evaluated. Without mixing, H_res is None."""
    leading, n, C, _ = sizes
    known = {**op.sizes(n, C, static), "R": rank_of(C)}
    arrays: list[mx.array | None] = []
    for name, (words, *_) in op.patterns.items():
        if name == "h_pre" and name in op.optional:
            continue
        if name == "h_res" and not mixes:
            arrays.append(None)
            continue
        ahead: tuple[int, ...] = leading if words[0] == "..." else ()
        shape: tuple[int, ...] = (*ahead, *(known.get(w) or int(w) for w in words if w != "..."))
        narrow = name in ("x", "y", "res", "h", "logits", "matrix")
        arrays.append(mx.zeros(shape, getattr(mx, dtype if narrow else "float32")))
    return arrays


# ---- files ---------------------------------------------------------------------------------------


def complete(text: Text) -> str:
    """Return a whole Metal file: for MLX its utilities, then the text."""
    if text.library == "torch":
        return f"{text.text}\n"
    return f'{utilities()}\n#line 1 "{text.name}"\n{text.text}\n'


def write(folder: Path) -> int:
    """Write all texts and a list of them into a folder; return the number of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, Any]] = []
    for text in itertools.chain(texts(), texts(every=False, library="torch")):
        (folder / f"{text.name}.metal").write_text(complete(text), encoding="utf-8")
        listed.append({k: v for k, v in asdict(text).items() if k != "text"})
    (folder / "texts.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")
    return len(listed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all texts and print how many there are."""
    parser = argparse.ArgumentParser(
        prog="python -m mhc_metal_simulator.texts", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="is made where it is not there")
    folder: Path = parser.parse_args(arguments).folder
    print(f"{write(folder)} texts in {folder}")


if __name__ == "__main__":
    main()
