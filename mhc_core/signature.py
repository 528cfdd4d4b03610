"""One declaration per op, and the checks of every call, made from it.

``Op.arrays`` gives each array's shape in words: ``"... n C"`` is any leading shape and then the
sizes n and C; ``"... n | n"`` is one per token or one for all. The first array that has a size
binds it; every other array must agree. ``nC`` is ``n * C``; ``m`` and ``parts`` are the rows of phi
and the entries of scale, which the static argument ``variant`` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from mhc_core.backend import DTYPES
from mhc_core.checks import Check

__all__ = ["Op", "Out", "Signature", "dtype_name", "signature"]

Shape = tuple[int, ...]


class Out(NamedTuple):
    """The shape of an output in words, and whether it has the streams' dtype or the mappings'.

    The mappings' dtype is float32, or float64 for float64 streams. ``mixed`` says that it is H_res,
    which is None where the static argument ``variant`` mixes no streams. ``asked`` names a boolean
    static argument without which it is None.
    """

    shape: str
    dtype: Literal["stream", "mapping"]
    mixed: bool = False
    asked: str = ""


@dataclass(frozen=True, kw_only=True)
class Op:
    """The declaration of an op, from which its checks, cases and tables are made.

    Attributes
    ----------
    name
        The op's name, which its module and its public function have too.
    arrays
        The arrays in the order of the arguments, each with its shape in words. The conformance kit
        has sizes for n, C, m, nC and D, the last axis of n slices; by the name of an array it
        chooses numbers for it.
    outputs
        The outputs, in order.
    static
        The other arguments, each with its check: one of :mod:`mhc_core.checks`, or any function
        that takes the op's name, the argument's name and the value, and returns the plain value
        or raises.
    optional
        The arrays that may be None, or left out where they come last. A backend gets None for an
        array that is absent before others.
    constraint
        A function that takes the sizes and returns what is wrong with them, or None.
    """

    name: str
    arrays: Mapping[str, str]
    outputs: Mapping[str, Out]
    static: Mapping[str, Check] = field(default_factory=dict[str, Check])
    optional: tuple[str, ...] = ()
    constraint: Callable[[Mapping[str, int]], str | None] | None = None

    @cached_property
    def patterns(self) -> dict[str, list[list[str]]]:
        """Return the alternatives of every array's shape, split into words."""
        return {
            name: [alternative.split() for alternative in pattern.split("|")]
            for name, pattern in self.arrays.items()
        }

    @cached_property
    def projects(self) -> bool:
        """Return whether the variant's mixer decides the shapes of some arrays."""
        return any("m" in words for patterns in self.patterns.values() for words in patterns)

    def outputs_of(self, static: Mapping[str, Any]) -> dict[str, Out]:
        """Return the outputs that are not None with these static arguments."""
        mixes = not self.projects or static["variant"].mixes
        return {
            name: out
            for name, out in self.outputs.items()
            if (mixes or not out.mixed) and (not out.asked or static[out.asked])
        }

    def kept(self, static: Mapping[str, Any]) -> tuple[bool, ...]:
        """Return, for each output, whether it is an array with these static arguments."""
        kept = self.outputs_of(static)
        return tuple(name in kept for name in self.outputs)

    def sizes(self, n: int, C: int, static: Mapping[str, Any]) -> dict[str, int]:
        """Return every size that the shapes in words may name."""
        known = {"n": n, "C": C, "D": n * C, "nC": n * C}
        if self.projects:
            variant = static["variant"]
            known |= {"m": variant.columns(n), "parts": variant.parts(n)}
        return known


class Signature(NamedTuple):
    """The description of one kind of call, after its checks."""

    op: Op
    leading: Shape
    sizes: Mapping[str, int]
    names: tuple[str, ...]  # of the arrays that are there, for messages
    dtypes: tuple[str, ...]  # of the arrays, by name
    n: int | None  # streams; None for an op without streams
    key: tuple[Any, ...]  # op, dtypes, n and all that follows static: the input of a selection
    static: Mapping[str, Any]
    mixers: tuple[str, ...] = ()  # the mixers that a backend needs for it
    fields: tuple[str, ...] = ()  # the variant's fields that not every backend knows
    absent: tuple[str, ...] = ()  # the arrays that are None, or left out

    @property
    def stream_dtype(self) -> str:
        """Return the dtype name of the first array."""
        return self.dtypes[0]

    @property
    def mapping_dtype(self) -> str:
        """Return the dtype name in which mappings are computed and returned."""
        return "float64" if self.stream_dtype == "float64" else "float32"

    @property
    def output_shapes(self) -> list[Shape]:
        """Return the shapes of the outputs."""
        return [
            _expected(out.shape.split(), self.leading, self.sizes, self.static)
            for out in self.outputs
        ]

    @property
    def output_dtypes(self) -> list[str]:
        """Return the dtype names of the outputs."""
        names = {"stream": self.stream_dtype, "mapping": self.mapping_dtype}
        return [names[out.dtype] for out in self.outputs]

    @property
    def outputs(self) -> list[Out]:
        """Return the outputs that are not None."""
        return list(self.op.outputs_of(self.static).values())


UNMIXED = "h_res"
"""The array without which streams are not mixed: its absence stands for the identity."""

_CACHE: dict[Any, Signature] = {}
_CACHE_LIMIT = 4096


def signature(
    get_op: Callable[[str], Op],
    op: str,
    arrays: Sequence[Any],
    static: Mapping[str, Any],
    cotangents: Sequence[Any] | None = None,
) -> Signature:
    """Check a call of an op, or of its vjp if cotangents are passed, and describe it.

    A kind of call that was seen before costs one lookup.
    """
    try:
        key: Any = (
            op,
            len(arrays),
            None
            if cotangents is None
            else tuple([None if c is None else (c.shape, c.dtype) for c in cotangents]),
            *[None if array is None else (array.shape, array.dtype) for array in arrays],
            *[(type(value), value) for value in static.values()],
        )
        checked = _CACHE.get(key)
    except (AttributeError, TypeError):  # no array, or a static argument that cannot be right
        return _check(get_op(op), arrays, static, cotangents)
    if checked is None:
        checked = _check(get_op(op), arrays, static, cotangents)
        if len(_CACHE) >= _CACHE_LIMIT:
            _CACHE.clear()
        _CACHE[key] = checked
    return checked


def _check(
    op: Op, arrays: Sequence[Any], static: Mapping[str, Any], cotangents: Sequence[Any] | None
) -> Signature:
    plain = {name: check(op.name, name, static[name]) for name, check in op.static.items()}
    there = [
        (name, array)
        for name, array in zip(op.arrays, arrays, strict=False)
        if array is not None or name not in op.optional
    ]
    names, arrays = tuple(name for name, _ in there), [array for _, array in there]
    absent = tuple(name for name in op.arrays if name not in names)
    shapes = [_shape(op.name, name, a) for name, a in zip(names, arrays, strict=True)]
    dtypes = [_dtype(op.name, name, a) for name, a in zip(names, arrays, strict=True)]
    for name, dtype in zip(names, dtypes, strict=True):
        if dtype == "float64" != dtypes[0]:
            raise TypeError(
                f"{op.name}: {name} has dtype float64 beside {names[0]} of {dtypes[0]}; needs "
                f"float32 or less there, or float64 {names[0]} (nothing is narrowed silently)"
            )
    sizes = {name: value for name, value in plain.items() if name == "n"}
    leading: Shape | None = None
    for name, shape in zip(names, shapes, strict=True):
        leading = _match(op, name, shape, leading, sizes, plain)
        if op.projects and "n" in sizes and (reason := plain["variant"].refuses(sizes["n"])):
            raise ValueError(f"{op.name}: {reason}")
    problem = op.constraint(sizes) if op.constraint else None
    if problem:
        raise ValueError(f"{op.name}: {problem}")
    mixers = (plain["variant"].mixer,) if op.projects else ()
    if UNMIXED in absent:
        mixers = tuple(dict.fromkeys((*mixers, "identity")))
    n = sizes.get("n")
    fields: tuple[str, ...] = plain["variant"].beyond if "variant" in plain else ()
    key = (op.name, tuple(dtypes), n, mixers, fields, absent)
    call = Signature(
        *(op, leading or (), sizes, names, tuple(dtypes), n, key, plain), mixers, fields, absent
    )
    return call if cotangents is None else _with_cotangents(call, cotangents)


def _shape(owner: str, name: str, array: Any) -> Shape:
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(
            f"{owner}: {name} is a {type(array).__name__}; needs an array "
            "(numpy.ndarray, jax.Array, mlx.core.array or that of another backend)"
        )
    return tuple(array.shape)


def dtype_name(dtype: Any) -> str:
    """Return a dtype's plain name, whichever library it comes from."""
    return str(dtype).rpartition(".")[2]


def _dtype(owner: str, name: str, array: Any) -> str:
    dtype = dtype_name(array.dtype)
    if dtype not in DTYPES:
        raise TypeError(
            f"{owner}: {name} has dtype {dtype}; needs {', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
        )
    return dtype


def _match(
    op: Op,
    name: str,
    shape: Shape,
    leading: Shape | None,
    sizes: dict[str, int],
    static: Mapping[str, Any],
) -> Shape:
    """Match one shape against its patterns, bind the sizes it defines, return the leading shape."""
    for words in op.patterns[name]:
        bound = dict(sizes)
        got = _try(words, shape, leading, bound, static)
        if got is not None:
            sizes.update(bound)
            return leading if leading is not None else got
    raise ValueError(_mismatch(op, name, shape, leading, sizes, static))


def _try(
    words: list[str],
    shape: Shape,
    leading: Shape | None,
    sizes: dict[str, int],
    static: Mapping[str, Any],
) -> Shape | None:
    """Return the leading shape if ``shape`` fits ``words``, else None; bind sizes on the way."""
    named = words[1:] if words[0] == "..." else words
    split = len(shape) - len(named)
    if split < 0 or (split > 0 and words[0] != "..."):
        return None
    if words[0] == "..." and leading is not None and shape[:split] != leading:
        return None
    for word, size in zip(named, shape[split:], strict=True):
        need = _size(word, sizes, static)
        if need is None and size >= 1:
            sizes[word] = int(size)  # a compiler's symbolic size becomes a number
        elif need != size:
            return None
    return shape[:split]


def _size(word: str, sizes: Mapping[str, int], static: Mapping[str, Any]) -> int | None:
    if word.isdigit():
        return int(word)
    if word == "m" and "n" in sizes:
        return static["variant"].columns(sizes["n"])
    if word == "parts" and "n" in sizes:
        return static["variant"].parts(sizes["n"])
    if word == "nC" and "n" in sizes and "C" in sizes:
        return sizes["n"] * sizes["C"]
    return sizes.get(word)


def _expected(
    words: list[str], leading: Shape, sizes: Mapping[str, int], static: Mapping[str, Any]
) -> Shape:
    ahead = leading if words[0] == "..." else ()
    named = words[1:] if words[0] == "..." else words
    return (*ahead, *[_size(word, sizes, static) or 0 for word in named])


def _spell(words: Sequence[object]) -> str:
    return f"({', '.join(map(str, words))}{',' if len(words) == 1 else ''})"


def _mismatch(
    op: Op,
    name: str,
    shape: Shape,
    leading: Shape | None,
    sizes: Mapping[str, int],
    static: Mapping[str, Any],
) -> str:
    parts = _size("parts", sizes, static) if "parts" in op.patterns[name][0] else None
    alternatives = [
        [str(parts) if word == "parts" else word for word in words] for words in op.patterns[name]
    ]
    symbolic = " or ".join(map(_spell, alternatives))
    text = f"{op.name}: {name} has shape {shape}; needs {symbolic}"
    if leading is None:
        return f"{text}, every size but the leading ones at least 1"
    here: list[list[object]] = []
    for words in alternatives:
        ahead = words[0] == "..."
        known: list[object] = [
            _size(w, sizes, static) or w for w in (words[1:] if ahead else words)
        ]
        here.append([*leading, *known] if ahead else known)
    bound = ", ".join(f"{key}={value}" for key, value in sizes.items())
    concrete = " or ".join(map(_spell, here))
    return text if concrete == symbolic else f"{text}, here {concrete} with {bound}"


def _with_cotangents(call: Signature, cotangents: Sequence[Any]) -> Signature:
    """Raise unless there is one float cotangent per output, of its shape; describe the vjp."""
    owner = f"vjp of {call.op.name}"
    if len(cotangents) != len(call.op.outputs):
        outputs = ", ".join(call.op.outputs)
        raise ValueError(
            f"{owner}: cotangents has length {len(cotangents)}; needs {len(call.op.outputs)}, for "
            f"{outputs}"
        )
    kept = call.op.kept(call.static)
    for name, cotangent, there in zip(call.op.outputs, cotangents, kept, strict=True):
        if not there and cotangent is not None:
            raise ValueError(
                f"{owner}: the cotangent of {name} is given; needs None, as {name} is None"
            )
    names = tuple(f"the cotangent of {name}" for name in call.op.outputs_of(call.static))
    cotangents = [c for c, there in zip(cotangents, kept, strict=True) if there]
    for name, shape, cotangent in zip(names, call.output_shapes, cotangents, strict=True):
        got = _shape(owner, name, cotangent)
        if got != shape:
            raise ValueError(f"{owner}: {name} has shape {got}; needs the output's {shape}")
        if _dtype(owner, name, cotangent) == "float64" != call.stream_dtype:
            raise TypeError(
                f"{owner}: {name} has dtype float64 beside streams of {call.stream_dtype}; "
                "needs float32 or less (nothing is narrowed silently)"
            )
    dtypes = (*call.dtypes, *(dtype_name(cotangent.dtype) for cotangent in cotangents))
    key = (call.op.name, dtypes, *call.key[2:])
    return call._replace(names=call.names + names, dtypes=dtypes, key=key)
