"""Golden cases in files, for kernels that no Python can call: written here, answered elsewhere.

A folder has ``index.json`` and, for each case, one file of safetensors: a little-endian length of
eight bytes, a JSON header with each array's dtype, shape and place, and the numbers.

=================  =============================================================================
``in.NAME``        the inputs; streams in the case's dtype, parameters and mappings in float32
``ct.NAME``        the cotangents of the outputs, for gradients
``out.NAME``       the oracle's outputs, in float64
``grad.NAME``      the oracle's gradients of ``sum(ct * out)``, in float64
=================  =============================================================================

Whoever has an implementation reads ``in.*`` (and ``ct.*``), and writes ``out.*``, ``grad.*`` or
both, in the dtypes that the index names, into ``CASE.answer.safetensors`` beside the case.
``mhc conformance --against FOLDER`` then gives a verdict for each case.
"""

from __future__ import annotations

import json
import reprlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import mhc_core
from mhc_conformance.cases import STATICS, Case, Sizes, declaration, numpy_dtype, with_variant
from mhc_conformance.golden import Golden, Want
from mhc_conformance.tolerances import Quantity
from mhc_core import Variant, math
from mhc_core.variants import check_variant

__all__ = ["ANSWER", "FORMAT", "INDEX", "Answer", "against", "cases_for", "export", "variants"]

Array = NDArray[Any]

FORMAT = 1  # of the index; goes up when a reader of the old one would misread it
INDEX = "index.json"
ANSWER = ".answer.safetensors"

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}
_DTYPES = {short: name for name, short in _NAMES.items()}
_ROLES: Mapping[Quantity, str] = {"forward": "out", "gradient": "grad"}


# --- files ------------------------------------------------------------------------------------


def write(file: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name as safetensors, bfloat16 included.

    By hand: what the library's ``serialize`` takes has changed between its versions.
    """
    header: dict[str, Any] = {}
    data, place = [array.tobytes() for array in arrays.values()], 0
    for (name, array), part in zip(arrays.items(), data, strict=True):
        ends = place + len(part)
        dtype, shape = _NAMES[str(array.dtype)], list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, ends]}
        place = ends
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def read(file: Path) -> dict[str, Array]:
    """Return the arrays of a file of safetensors by name; raise ValueError for a bad file."""
    whole = file.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", whole)
        header: dict[str, Any] = json.loads(whole[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _array(whole[8 + length :], header[name]) for name in header}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is no file of safetensors: {error}") from None


def _array(data: bytes, entry: Mapping[str, Any]) -> Array:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is none of {', '.join(_DTYPES)}")
    begins, ends = entry["data_offsets"]
    dtype = numpy_dtype(_DTYPES[entry["dtype"]])
    return cast("Array", np.frombuffer(data[begins:ends], dtype)).reshape(tuple(entry["shape"]))


# --- writing ----------------------------------------------------------------------------------


def variants() -> dict[str, Variant]:
    """Return the published variants by name."""
    return {name: v for name, v in vars(mhc_core).items() if isinstance(v, Variant)}


def cases_for(
    ops: Sequence[str] = (),
    variant: str = "DEEPSEEK_V4",
    n: int = 4,
    C: int = 64,
    tokens: int = 8,
) -> list[Case]:
    """Return a case of each op with these sizes; raise ValueError for sizes that do not fit."""
    chosen = variants()[variant]
    reason = chosen.refuses(n)
    if reason is not None:
        raise ValueError(f"variant {variant}: {reason}")
    sizes = Sizes((tokens,), n, C, "as asked for")
    return [_case(op, variant, chosen, sizes) for op in ops or math.OPS]


def _case(op: str, name: str, variant: Variant, sizes: Sizes) -> Case:
    declared = declaration(op)
    static = STATICS[op][0][1]
    if check_variant in declared.static.values():
        static = with_variant(op, variant, h_raw=True)
    if "n" in declared.static:
        static = (("n", sizes.n), *static)
    case = Case(
        op, name if declared.projects or "variant" in declared.static else op, sizes, static
    )
    mixes = variant.mixes or "h_res" not in declared.optional
    return case if mixes else replace(case, unmixed=True)


def export(folder: Path, cases: Iterable[Golden], command: str = "") -> list[dict[str, Any]]:
    """Write cases and their index into a folder; return the index's entries."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_exported(folder, one) for one in cases]
    index = {
        "format": FORMAT,
        "command": command,
        "version": mhc_core.__version__,
        "error": "max |got - want| / max |want|, each array by itself",
        "answers": f"CASE{ANSWER}, beside the case",
        "cases": entries,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return entries


def _exported(folder: Path, one: Golden) -> dict[str, Any]:
    case = one.case
    name = f"{case.op}-{one.dtype}-n{case.sizes.n}-C{case.sizes.C}-{_word(case.label)}"
    arrays: dict[str, Array] = {}
    arrays |= {f"in.{k}": a for k, a in zip(case.names, one.primals, strict=True)}
    arrays |= {f"ct.{k}": a for k, a in zip(one.outputs, one.cotangents, strict=True)}
    wanted: dict[str, dict[str, Any]] = {}
    for quantity, role in _ROLES.items():
        for want in one.want(quantity):
            arrays[f"{role}.{want.name}"] = want.value
            wanted[f"{role}.{want.name}"] = {
                "dtype": want.dtype,
                "shape": list(want.value.shape),
                "allowed": want.limit,
            }
    write(folder / f"{name}.safetensors", arrays)
    return {
        "case": name,
        "op": case.op,
        "dtype": one.dtype,
        "seed": one.seed,
        "label": case.label,
        "sizes": {"leading": list(case.sizes.leading), "n": case.sizes.n, "C": case.sizes.C},
        "unmixed": case.unmixed,
        "static": {k: asdict(v) if isinstance(v, Variant) else v for k, v in case.static},
        "inputs": {k: _described(arrays[f"in.{k}"]) for k in case.names},
        "wanted": wanted,
    }


def _word(label: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in label)


def _described(array: Array) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


# --- checking ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """The verdict on one case."""

    case: str
    outcome: str  # holds, off, or missing
    worst: float = 0.0  # of all arrays, the largest share of what is allowed
    says: str = ""


def against(folder: Path) -> Iterator[Answer]:
    """Yield a verdict for every case of a folder.

    Raises
    ------
    ValueError
        If the folder has no index of golden cases, or not the cases that its index names; before
        any verdict.
    """
    for entry in list(_entries(folder)):
        yield _checked(folder, entry)


def _entries(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the entries of a folder's index, each of which has its case there."""
    file = folder / INDEX
    try:
        index: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    told = _Told(file)
    index = told.of("the whole", index, dict, "an object, as mhc conformance --export writes it")
    if index.get("format") != FORMAT:
        raise ValueError(f"{file} has format {reprlib.repr(index.get('format'))}; needs {FORMAT}")
    for k, entry in enumerate(told.of("cases", index.get("cases"), list, "a list")):
        _check(told, f"cases[{k}]", entry)
        path = folder / f"{entry['case']}.safetensors"
        try:
            right = read(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        inputs = {f"in.{name}": about for name, about in entry["inputs"].items()}
        wide = {key: {**about, "dtype": "float64"} for key, about in entry["wanted"].items()}
        for key, about in {**inputs, **wide}.items():
            need = f"{about['dtype']} {about['shape']}"
            have = f"{right[key].dtype} {list(right[key].shape)}" if key in right else "not there"
            if have != need:
                raise ValueError(f"{path}: {key} is {have}; {file} says {need}")
        yield entry


class _Told:
    """The content of a file, each part of the type that it needs."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def of(self, name: str, value: Any, kind: type, needs: str, good: bool = True) -> Any:
        """Return a part of the file; raise ValueError with its name if it is of another type."""
        boolean = isinstance(value, bool) and kind is not bool
        if isinstance(value, kind) and not boolean and good:
            return value
        raise self.wrong(name, f"is {reprlib.repr(value)}; needs {needs}")

    def wrong(self, name: str, says: str) -> ValueError:
        """Return the error for a part."""
        return ValueError(f"{self._file} is no index of golden cases: {name} {says}")


def _check(told: _Told, name: str, entry: Any) -> None:
    """Check an entry of the index; raise ValueError with the name of what is wrong."""

    def part(key: str, kind: type, needs: str, good: Callable[[Any], bool] = lambda _: True) -> Any:
        value = entry.get(key)
        fits = isinstance(value, kind) and good(value)
        return told.of(f"{name}[{key!r}]", value, kind, needs, fits)

    told.of(name, entry, dict, "an object")
    part("case", str, "the name of a file in the folder", lambda case: Path(case).name == case)
    part("op", str, f"one of {', '.join(math.OPS)}", math.OPS.__contains__)
    part("dtype", str, f"one of {', '.join(_NAMES)}", _NAMES.__contains__)
    part("label", str, "a text")
    part("unmixed", bool, "true or false")
    part("seed", int, "an integer of at least 0", lambda seed: seed >= 0)
    sizes = part("sizes", dict, "an object with leading, n and C")
    lengths = sizes.get("leading")
    if not isinstance(lengths, list):
        lengths = [None]
    numbers: list[Any] = [*lengths, sizes.get("n"), sizes.get("C")]
    if any(type(one) is not int or one < 0 for one in numbers):
        raise told.wrong(
            f"{name}['sizes']", f"is {reprlib.repr(sizes)}; needs integers of at least 0"
        )
    for group, needed in (("inputs", _SHAPED), ("wanted", {**_SHAPED, "allowed": (int, float)})):
        entries: Mapping[str, Any] = part(group, dict, "an object")
        for key, about in entries.items():
            have: Any = about
            told.of(
                f"{name}[{group!r}][{key!r}]", have, dict, f"an object with {', '.join(needed)}"
            )
            if not all(isinstance(have.get(one), kind) for one, kind in needed.items()):
                says = f"is {reprlib.repr(have)}; needs {', '.join(needed)}"
                raise told.wrong(f"{name}[{group!r}][{key!r}]", says)
    part("static", dict, "an object")
    try:
        case = _case_of(entry)
    except (TypeError, ValueError) as error:
        raise told.wrong(f"{name}['static']", f"has no variant: {error}") from None
    if list(entry["inputs"]) != case.names:
        says = f"are {', '.join(entry['inputs'])}; {case.op} has {', '.join(case.names)}"
        raise told.wrong(f"{name}['inputs']", says)


_SHAPED: Mapping[str, Any] = {"dtype": str, "shape": list}


def _checked(folder: Path, entry: Mapping[str, Any]) -> Answer:
    name = entry["case"]
    file = folder / f"{name}{ANSWER}"
    if not file.exists():
        return Answer(name, "missing", says=f"there is no {file.name}")
    try:
        given = read(file)
        right = read(folder / f"{name}.safetensors")
    except (OSError, ValueError) as error:
        return Answer(name, "off", float("inf"), str(error))
    wanted = entry["wanted"]
    unknown = [key for key in given if key not in wanted]
    if unknown:
        return Answer(name, "off", float("inf"), f"{unknown[0]} is none of {', '.join(wanted)}")
    roles = {role for role in _ROLES.values() if any(key.startswith(f"{role}.") for key in given)}
    asked = {key: about for key, about in wanted.items() if key.split(".")[0] in roles}
    if not asked:
        return Answer(name, "missing", says=f"{file.name} has no arrays")
    wants = _seamed(entry, given, right)
    worst, says = 0.0, ""
    for key, about in asked.items():
        share, problem = _compared(key, about, given.get(key), wants.get(key), right)
        if problem and not says:
            says = problem
        worst = max(worst, share)
    return Answer(name, "off" if says else "holds", worst, says)


def _seamed(
    entry: Mapping[str, Any], given: Mapping[str, Array], right: Mapping[str, Array]
) -> dict[str, Want]:
    """Return the wanted arrays that depend on an output as it was rounded, of the answer's own."""
    outputs = {k[4:]: a for k, a in given.items() if k.startswith("out.")}
    case = _case_of(entry)
    one = Golden(case, entry["dtype"], entry["seed"])
    same = all(
        np.array_equal(right[f"in.{k}"], a, equal_nan=True)
        for k, a in zip(case.names, one.primals, strict=True)
    )
    if not same or not one.reads(outputs):
        return {}
    found: dict[str, Want] = {}
    for quantity, role in _ROLES.items():
        found |= {f"{role}.{want.name}": want for want in one.want(quantity, outputs)}
    return found


def _case_of(entry: Mapping[str, Any]) -> Case:
    sizes = entry["sizes"]
    static = tuple(
        (name, Variant(**_tuples(value)) if name == "variant" else value)
        for name, value in entry["static"].items()
    )
    leading = tuple(sizes["leading"])
    shape = Sizes(leading, sizes["n"], sizes["C"], "as asked for")
    return Case(entry["op"], entry["label"], shape, static, unmixed=entry["unmixed"])


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a variant's fields as they were before JSON made lists of tuples."""
    return {name: _tupled(value) for name, value in fields.items()}


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, cast("list[Any]", value))) if isinstance(value, list) else value


def _compared(
    key: str,
    about: Mapping[str, Any],
    got: Array | None,
    want: Want | None,
    right: Mapping[str, Array],
) -> tuple[float, str]:
    """Return an array's share of what is allowed, and what is wrong with it."""
    if got is None:
        return float("inf"), f"{key} is not there"
    have = f"{got.dtype} {list(got.shape)}"
    if str(got.dtype) != about["dtype"] or list(got.shape) != about["shape"]:
        return float("inf"), f"{key} is {have}; needs {about['dtype']} {about['shape']}"
    if want is None:
        want = Want(key, right[key], about["dtype"], about["allowed"])
    error = want.error(got)
    share = error / want.limit if want.limit else (float("inf") if error else 0.0)
    says = f"{key} is off by {error:.3g}, allowed {want.limit:.3g}" if share > 1 else ""
    return share, says
