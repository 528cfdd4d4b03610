"""The program of a launch: a kernel's text, its launch shape and its limits, from one call."""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from mhc_backends.kernels.launch import ACCESS_BYTES, Launch, launch, occupancy
from mhc_backends.kernels.text import entry, header, signature

__all__ = ["Program", "Sizes", "Stage", "program"]


class _Shaped(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...


class Sizes(NamedTuple):
    """T tokens of n streams of C channels."""

    T: int
    n: int
    C: int

    @classmethod
    def of(cls, x: _Shaped) -> Sizes:
        """Read the sizes off streams x[..., n, C]."""
        *leading, n, C = x.shape
        return cls(math.prod(leading), n, C)


class Stage(NamedTuple):
    """The threadgroup memory of a kernel whose size the launch determines.

    Attributes
    ----------
    steps
        The number of K steps whose B operands are in threadgroup memory at a time.
    each
        The bytes of one of these.
    buffers
        The bytes of the pipeline's buffers.
    """

    steps: int
    each: int
    buffers: int


class Program(NamedTuple):
    """A kernel as one launch needs it.

    Attributes
    ----------
    header
        The text that comes before the function that MLX writes.
    source
        The text inside that function.
    digest
        A short name for that text; empty if the kernel has no other.
    template
        The function's template arguments.
    launch
        The grid and the threadgroup.
    memory
        The bytes of threadgroup memory that a launch in CUDA asks for.
    bounds
        CUDA's launch bounds: the most threads, and how many such threadgroups fit on a
        multiprocessor at least. Without them a kernel may need more registers than its threads
        have. None in Metal.
    """

    header: str
    source: str
    digest: str
    template: tuple[tuple[str, int], ...]
    launch: Launch
    memory: int
    bounds: tuple[int, int] | None


def program(
    kernel: str,
    dialect: str,
    dtype: str,
    sizes: Sizes,
    *,
    absent: frozenset[str] = frozenset(),
    numbers: Mapping[str, float] | None = None,
    stage: Stage | None = None,
    constants: Mapping[str, int] | None = None,
) -> Program:
    """Return the program of a launch.

    Parameters
    ----------
    kernel, dialect
        Names of the kernel and of its language.
    dtype
        The dtype of the kernel's first input, on which the launch shape depends.
    sizes
        The tokens, streams and channels.
    absent
        Inputs and outputs that this launch does not have.
    numbers
        Values that become part of the text; those that the kernel does not take are left out.
    stage
        The threadgroup memory of a kernel whose launch determines it.
    constants
        Template arguments in addition to those of the sizes and the launch.
    """
    made = launch(kernel, *sizes, dtype, dialect)
    words = {
        "N": sizes.n,
        "W": made.elements,
        "TOKENS": made.tokens,
        "HELD": made.held,
        "REST": int(made.rest),
        **(constants or {}),
    }
    memory = 0
    if stage is not None:
        memory = stage.steps * stage.each + stage.buffers
        words |= {"STAGE_STEPS": stage.steps, "BUFFER_FRAGMENTS": stage.buffers // ACCESS_BYTES}
    taken = signature(kernel).parameters
    given = tuple((name, value) for name, value in (numbers or {}).items() if name in taken)
    texts = _texts(kernel, dialect, absent, given, stage is not None)
    template = tuple((word, value) for word, value in words.items() if word in texts.words)
    return Program(
        texts.header,
        texts.source,
        texts.digest,
        template,
        made,
        memory if dialect == "cuda" else 0,  # in Metal the text has the size
        occupancy(kernel, dtype, sizes.n, made.threadgroup[0], words.get("COLUMN_TILES", 1))
        if dialect == "cuda"
        else None,
    )


class _Texts(NamedTuple):
    header: str
    source: str
    digest: str
    words: frozenset[str]


@functools.cache
def _texts(
    kernel: str,
    dialect: str,
    absent: frozenset[str],
    numbers: tuple[tuple[str, float], ...],
    launched: bool,
) -> _Texts:
    source = entry(kernel, dialect, absent, numbers, launched)
    digest = f"{zlib.crc32(source.encode()):x}" if absent or numbers else ""
    words = signature(kernel).words & {*re.findall(r"\w+", source)}
    return _Texts(header(kernel, dialect), source, digest, words)
