"""Makes the Metal text that MLX generates acceptable to clang as C++, line for line.

The text itself stays as it is but for these edits, none of which moves a line:

* ``threadgroup T x[N];`` becomes a reference to storage that each threadgroup has to itself
  (C++ has no such variables);
* ``float4(...)``, ``(float4)x`` and ``static_cast<float4>(x)`` become calls of the shim, which
  convert as Metal does (clang's own vector casts reinterpret the bits);
* ``0.5h`` and ``0.5bf`` become ``half(0.5f)`` and ``bfloat(0.5f)``;
* the attributes of the explicit instantiation that MLX appends are dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mhc_metal_simulator import branches
from mhc_metal_simulator.errors import CompileError, SimulatorError

__all__ = ["ATTRIBUTES", "Parameter", "Prepared", "prepare"]

# In this order runtime/schedule.h numbers them.
ATTRIBUTES = (
    "dispatch_quadgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "grid_origin",
    "grid_size",
    "quadgroup_index_in_threadgroup",
    "quadgroups_per_threadgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "thread_execution_width",
    "thread_index_in_quadgroup",
    "thread_index_in_simdgroup",
    "thread_index_in_threadgroup",
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_simdgroup",
    "threads_per_threadgroup",
)

_SCALARS = (
    "float|half|bfloat|char|uchar|short|ushort|int|uint|long|ulong|bool"  # the vectors' elements
)
_VECTOR = re.compile(rf"(?:packed_)?(?:{_SCALARS})[234]\Z")
_ALIAS = re.compile(
    rf"\busing\s+(\w+)\s*=\s*(?:metal::)?(?:vec\s*<[^;]*>|(?:{_SCALARS})[234])\s*;"
    rf"|\btypedef\s+(?:metal::)?(?:vec\s*<[^;]*>|(?:{_SCALARS})[234])\s+(\w+)\s*;"
)
_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:\\\n|[^\n])*)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
      | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<sign>::|->|.)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_KERNEL = re.compile(r"\[\[kernel\]\]\s+void\s+(\w+)\s*\(")
_INSTANTIATION = re.compile(
    r"^template\s*(\[\[host_name\(\"[^\"]*\"\)\]\]\s*\[\[kernel\]\])\s*decltype\((.*?)\)\s*\S",
    re.MULTILINE,
)
_NARROW_LITERAL = re.compile(r"(?!0[xX])(\d*\.?\d*(?:[eE][+-]?\d+)?)(h|H|bf|BF)\Z")
_PARAMETER = re.compile(
    r"(?P<type>.*?)\b(?P<name>\w+)\s*\[\[(?P<role>\w+)(?:\((?P<index>\d+)\))?\]\]"
)

_PRELUDE = '#include <metal_stdlib>\n#include "shim/mlx.h"\nusing namespace metal;\n#line 1 "{}"\n'


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated kernel: a buffer, or a built-in, such as a position."""

    type: str
    name: str
    role: str


@dataclass(frozen=True)
class Prepared:
    """C++ text, the buffers that it takes in their order, and the original text."""

    text: str
    buffers: tuple[Parameter, ...]
    original: str
    file: str
    branches: tuple[branches.Branch, ...] = ()


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


_Edits = list[tuple[int, int, str]]


def prepare(original: str, name: str) -> Prepared:
    """Turn MLX's text for the kernel ``name`` into a C++ translation unit."""
    tokens = _tokens(original)
    _require_constant_space(tokens, original, name)
    edits: _Edits = []
    edits += _shared_declarations(tokens)
    edits += _vector_calls(tokens, original)
    edits += _narrow_literals(tokens)
    edits += _instantiation_attributes(original)
    marks, choices = branches.find(original, _tokens)
    edits += marks
    file = f"{name}.metal"
    parameters, kernel = _signature(original)
    text = _PRELUDE.format(file) + _apply(original, edits) + _entry(parameters, kernel)
    buffers = tuple(p for p in parameters if p.role == "buffer")
    return Prepared(text, buffers, original, file, choices)


def _tokens(text: str) -> list[_Token]:
    found = (m for m in _TOKEN.finditer(text) if m.lastgroup != "skip")
    return [_Token(m.lastgroup or "", m.group(), m.start(), m.end()) for m in found]


def _apply(text: str, edits: _Edits) -> str:
    out: list[str] = []
    at = 0
    for start, end, new in sorted(edits):
        out += [text[at:start], new]
        at = end
    return "".join(out) + text[at:]


# ---- threadgroup variables -----------------------------------------------------------------------


def _shared_declarations(tokens: list[_Token]) -> _Edits:
    edits: _Edits = []
    for i, token in enumerate(tokens):
        starts = i == 0 or tokens[i - 1].text in (";", "{", "}")
        if token.text == "threadgroup" and starts:
            edits += _shared_declaration(tokens, i)
    return edits


def _shared_declaration(tokens: list[_Token], first: int) -> _Edits:
    """Rewrite one declaration, unless it declares a pointer, a reference or a function."""
    end = _next_at_depth_0(tokens, first, (";", "{"))
    body = _flat(tokens, first + 1, end)
    if tokens[end].text != ";" or any(t.text in ("*", "&", "=") for t in body):
        return []
    edits: _Edits = [(tokens[first].start, tokens[first].end, "typedef")]
    after: list[str] = []
    for declared in _declared_names(body):
        alias, tag = f"mhc_type_{declared.text}", f"mhc_tag_{declared.text}"
        edits.append((declared.start, declared.end, alias))
        after.append(
            f' struct {tag} {{ static const char* name() {{ return "{declared.text}"; }} }};'
            f" threadgroup {alias}& {declared.text} = mhc::shared<{alias}, {tag}>();"
        )
    edits += _without_alignas(tokens, first, end)
    edits.append((tokens[end].end, tokens[end].end, "".join(after)))
    return edits


def _flat(tokens: list[_Token], first: int, end: int) -> list[_Token]:
    """Return the tokens outside all brackets, with ``[`` itself as a mark."""
    out: list[_Token] = []
    open_: list[str] = []
    for token in tokens[first:end]:
        is_angle = token.text in "<>"
        if not open_ and token.text not in ("<", "("):
            out.append(token)
        if is_angle and open_ and open_[-1] != "<":
            continue  # a comparison inside brackets
        if token.text in "([{<":
            open_.append(token.text)
        elif token.text in ")]}>" and open_:
            open_.pop()
    return out


def _declared_names(body: list[_Token]) -> list[_Token]:
    """Return the last word before each ``[``, comma or end."""
    names: list[_Token] = []
    candidate: _Token | None = None
    for token in body:
        if token.text == ",":
            names += [candidate] if candidate else []
            candidate = None
        elif token.kind == "word" and token.text != "alignas":
            candidate = token
    return names + ([candidate] if candidate else [])


def _without_alignas(tokens: list[_Token], first: int, end: int) -> _Edits:
    # The storage is aligned to 256 bytes anyway, and a typedef takes no alignas.
    for i in range(first, end):
        if tokens[i].text == "alignas":
            close = _matching(tokens, i + 1)
            return [(tokens[i].start, tokens[close].end, "")]
    return []


def _next_at_depth_0(tokens: list[_Token], first: int, ends: tuple[str, ...]) -> int:
    depth = 0
    for i in range(first, len(tokens)):
        if depth == 0 and tokens[i].text in ends:
            return i
        depth += (tokens[i].text in "([") - (tokens[i].text in ")]")
    return len(tokens) - 1


def _matching(tokens: list[_Token], first: int) -> int:
    """Return the index of the bracket that closes ``tokens[first]``."""
    opening = tokens[first].text
    closing = {"(": ")", "[": "]", "{": "}", "<": ">"}[opening]
    depth = 0
    for i in range(first, len(tokens)):
        depth += (tokens[i].text == opening) - (tokens[i].text == closing)
        if depth == 0:
            return i
    return len(tokens) - 1


# ---- vectors -------------------------------------------------------------------------------------


def _vector_calls(tokens: list[_Token], text: str) -> _Edits:
    aliases = {a or b for a, b in _ALIAS.findall(text)}
    edits: _Edits = []
    done = -1
    for i in range(len(tokens)):
        last = _vector_type(tokens, i, aliases) if i > done else None
        if last is None or last + 1 >= len(tokens):
            continue
        before = tokens[i - 1].text if i else ""
        name = text[tokens[i].start : tokens[last].end]
        if before == "<" and i > 1 and tokens[i - 2].text == "static_cast":
            edits.append((tokens[i - 2].start, tokens[last + 1].end, f"mhc::make<{name}>"))
        elif before == "(" and tokens[last + 1].text == ")" and _is_cast(tokens, i - 1, last + 2):
            edits.append((tokens[i - 1].start, tokens[last + 1].end, f"mhc::to<{name}>()->*"))
        elif tokens[last + 1].text == "(":
            edits.append((tokens[i].start, tokens[last].end, f"mhc::make<{name}>"))
        done = last
    return edits


def _vector_type(tokens: list[_Token], i: int, aliases: set[str]) -> int | None:
    """Return the index of the last token of the vector type that starts at ``i``, if one does."""
    if tokens[i].text == "metal" and i + 2 < len(tokens) and tokens[i + 1].text == "::":
        return _vector_type(tokens, i + 2, aliases)
    word = tokens[i].text
    if _VECTOR.match(word) or word in aliases:
        return i
    if word == "vec" and i + 1 < len(tokens) and tokens[i + 1].text == "<":
        return _matching(tokens, i + 1)
    return None


def _is_cast(tokens: list[_Token], opening: int, operand: int) -> bool:
    before, after = tokens[opening - 1], tokens[operand]
    if before.kind == "word" and before.text not in ("return", "case", "else"):
        return False
    if before.text in (")", "]", ">") or before.kind == "number":
        return False
    return after.kind in ("word", "number") or after.text in ("(", "-", "+", "~", "!", "*")


def _narrow_literals(tokens: list[_Token]) -> _Edits:
    edits: _Edits = []
    for token in tokens:
        found = _NARROW_LITERAL.match(token.text) if token.kind == "number" else None
        if found:
            type_ = "half" if found[2] in "hH" else "bfloat"
            digits = found[1] if re.search(r"[.eE]", found[1]) else found[1] + "."
            edits.append((token.start, token.end, f"{type_}({digits}f)"))
    return edits


# ---- the kernel's own frame ----------------------------------------------------------------------


def _instantiation_attributes(text: str) -> _Edits:
    found = _INSTANTIATION.search(text)
    return [(found.start(1), found.end(1), "")] if found else []


def _signature(text: str) -> tuple[list[Parameter], str]:
    """Return the parameters of the kernel and the C++ name of its instance."""
    found = _KERNEL.search(text)
    if found is None:
        raise SimulatorError(f"no [[kernel]] function in the text that MLX generated:\n{text}")
    tokens = _tokens(text[found.end() - 1 :])
    inside = text[found.end() : found.end() - 1 + tokens[_matching(tokens, 0)].start]
    parameters = [
        Parameter(m["type"].strip(), m["name"], m["role"])
        for m in _PARAMETER.finditer(" ".join(inside.replace(",", " ").split()))
    ]
    instance = _INSTANTIATION.search(text)
    return parameters, instance.group(2) if instance else found.group(1)


def _entry(parameters: list[Parameter], kernel: str) -> str:
    """Write the function that the runtime calls for each thread."""
    arguments: list[str] = []
    buffer = 0
    for parameter in parameters:
        if parameter.role == "buffer":
            arguments.append(_buffer_argument(parameter.type, buffer))
            buffer += 1
        else:
            which = ATTRIBUTES.index(parameter.role)
            arguments.append(f"mhc::attribute<{parameter.type}>({which})")
    return (
        '\n#line 1 "entry"\n'
        'extern "C" __attribute__((visibility("hidden")))\n'
        "void mhc_kernel_entry(unsigned char* const* buffers) {\n"
        f"    {kernel}(\n        " + ",\n        ".join(arguments) + ");\n}\n"
    )


def _buffer_argument(type_: str, index: int) -> str:
    if type_.endswith("&"):
        return f"*({type_[:-1]}*)(ulong)buffers[{index}]"
    return f"({type_})(ulong)buffers[{index}]"


# ---- what Metal demands and C++ does not ---------------------------------------------------------


def _require_constant_space(tokens: list[_Token], text: str, name: str) -> None:
    """Refuse variables at program scope that are not in the constant address space."""
    statement: list[_Token] = []
    depth = 0
    initialiser = False
    for token in tokens:
        if depth == 0 and token.text == "{":
            initialiser = bool(statement) and statement[-1].text == "="
        depth += (token.text in "({[") - (token.text in ")}]")
        if depth > 0:
            continue
        if token.text == ";" and _is_plain_variable(statement):
            line = text.count("\n", 0, statement[0].start) + 1
            raise CompileError(
                f"{name}.metal:{line}: error: program scope variable must reside in constant "
                f"address space: {' '.join(t.text for t in statement)!r}"
            )
        ends = token.text == ";" or (token.text == "}" and not initialiser)
        statement = [] if ends else [*statement, token]


def _is_plain_variable(statement: list[_Token]) -> bool:
    words = [t.text for t in statement]
    other = {"using", "typedef", "template", "struct", "class", "enum", "namespace", "constant"}
    return "=" in words and not other & set(words) and "static_assert" not in words
