"""The inputs of the benchmark: sizes, and random arrays as the ops' declarations describe them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

__all__ = ["Sizes", "draw", "dtype_of", "nbytes", "shape_of"]

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
POOL = 1_000_003  # numbers drawn for one array; a prime, so that no two of its rows are alike

SPREAD: Mapping[str, tuple[float, float]] = {  # normal numbers, times the first, plus the second
    "phi": (0.01, 0.0),
    "scale": (0.1, 1.0),
    "bias": (0.5, 0.0),
    "h_pre": (0.1, 0.5),
    "h_post": (0.3, 1.0),
    "h_res": (0.1, 0.25),
    "rms_weight": (0.1, 1.0),
}


@dataclass(frozen=True)
class Sizes:
    """B batches of T tokens, n streams of C channels, and the dtype of the streams."""

    B: int
    T: int
    n: int
    C: int
    dtype: str

    @property
    def by_word(self) -> dict[str, int]:
        """Return the size that each word of the ops' declarations stands for."""
        n, C = self.n, self.C
        return {"n": n, "C": C, "D": n * C, "m": n * n + 2 * n, "parts": 3, "nC": n * C, "R": 64}

    def __str__(self) -> str:
        batch = f"B={self.B} " if self.B != 1 else ""
        return f"{batch}T={self.T} n={self.n} C={self.C} {self.dtype}"


def shape_of(pattern: str, sizes: Sizes, shared: bool = False) -> tuple[int, ...]:
    """Return the sizes of a declared shape, such as ``"... n | n"``: per token, or shared."""
    words = pattern.split("|")[-1 if shared else 0].split()
    ahead = (sizes.B, sizes.T) if words[0] == "..." else ()
    known = sizes.by_word
    return (*ahead, *(known[w] if w in known else int(w) for w in words if w != "..."))


def dtype_of(pattern: str, sizes: Sizes) -> str:
    """Return the dtype of an array of a declared shape: streams' own, float32 for all else."""
    words = pattern.split("|")[0].split()
    return sizes.dtype if words[0] == "..." and words[-1] in ("C", "D") else "float32"


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the number of bytes of an array."""
    return math.prod(shape) * ITEMSIZE[dtype]


def draw(name: str, shape: tuple[int, ...], dtype: str, rng: numpy.random.Generator) -> Any:
    """Draw random numbers for an argument of that name, none of them zero."""
    import ml_dtypes
    import numpy

    spread, centre = SPREAD.get(name, (1.0, 0.0))
    numbers = rng.standard_normal(min(math.prod(shape), POOL), dtype=numpy.float32)
    numbers = numbers * numpy.float32(spread) + numpy.float32(centre)
    own: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else numpy.dtype(dtype)
    numbers = numbers.astype(own)
    numbers[numbers == 0] = 1
    return numpy.resize(numbers, shape)
