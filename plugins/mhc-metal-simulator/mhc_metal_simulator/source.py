"""The conversion of MLX's Metal text to C++ that clang accepts, line for line.

These are the only edits, and none moves a line:

* ``threadgroup T x[N];`` becomes a reference to storage of each threadgroup (C++ has no such
  variables);
* ``float4(...)``, ``(float4)x`` and ``static_cast<float4>(x)`` become calls of the shim, which
  convert as Metal does (clang's own vector casts reinterpret the bits);
* ``0.5h`` and ``0.5bf`` become ``half(0.5f)`` and ``bfloat(0.5f)``;
* the attributes of the explicit instantiation that MLX appends are dropped;
* a parameter ``device T x[4]`` becomes a pointer, as clang does only in OpenCL;
* ``*(to) = *(from);`` becomes a call of the shim, which copies structs between address spaces;
* ``[[function_constant(3)]]`` becomes a value, zero, and ``[[threadgroup(0)]]`` nothing;
* member functions for objects in another space than ``thread`` (``T f() const device {...}``),
  which clang has only in OpenCL, are removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mhc_metal_simulator import branches, rules
from mhc_metal_simulator.errors import CompileError, SimulatorError

__all__ = [
    "ATTRIBUTES",
    "Parameter",
    "Prepared",
    "prepare",
    "prepare_declarations",
    "prepare_opencl",
    "require_metal",
]

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
_SPACES = ("device", "constant", "threadgroup")
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
    """The prepared C++ text, the buffers that it takes in their order, and the original text."""

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


def prepare(original: str, name: str, marked: bool = True) -> Prepared:
    """Turn MLX's text for the kernel ``name`` into a C++ translation unit.

    Unless it is ``marked``, no calls of the simulator are put around its choices.
    """
    tokens = _tokens(original)
    require_metal(original, name)
    edits: _Edits = []
    edits += _shared_declarations(tokens)
    edits += _vector_calls(tokens, original)
    edits += _narrow_literals(tokens)
    edits += _instantiation_attributes(original)
    edits += _members_of_other_spaces(tokens, original)
    edits += _parameters_of_arrays(tokens) + _attributes(original) + _whole_copies(tokens)
    marks, choices = branches.find(original, _tokens) if marked else ([], ())
    edits += marks
    file = f"{name}.metal"
    parameters, kernel = _signature(original)
    text = _PRELUDE.format(file) + _apply(original, edits) + _entry(parameters, kernel)
    buffers = tuple(p for p in parameters if p.role == "buffer")
    return Prepared(text, buffers, original, file, choices)


def prepare_declarations(original: str, name: str) -> str:
    """Turn a text of Metal that may lack a kernel of MLX's form into C++ for the front end."""
    tokens = _tokens(original)
    edits = _shared_declarations(tokens) + _vector_calls(tokens, original)
    edits += _narrow_literals(tokens) + _members_of_other_spaces(tokens, original)
    edits += _parameters_of_arrays(tokens) + _attributes(original) + _whole_copies(tokens)
    edits += _instantiation_attributes(original)
    prelude = f'#define MHC_WITH_MLX_HEADERS\n#include <metal_stdlib>\n#line 1 "{name}.metal"\n'
    return prelude + _apply(original, edits)


def prepare_opencl(original: str, name: str) -> str:
    """Turn MLX's text for a kernel into C++ for OpenCL, which has no kernels that are templates."""
    text = _apply(original, _vector_calls(_tokens(original), original))
    instance = _INSTANTIATION.search(text)
    constants = ""
    if instance:
        given = instance[2].partition("<")[2].rstrip("> ").split(",")
        text = text[: instance.start()]
        declared = re.search(r"template\s*<([^>]*)>\s*(?=\[\[kernel\]\])", text)
        if declared is None:
            raise SimulatorError(f"no template of the [[kernel]] function in the text:\n{text}")
        text = text[: declared.start()] + "\n" * declared[0].count("\n") + text[declared.end() :]
        for parameter, value in zip(declared[1].split(","), given, strict=True):
            kind, word = parameter.split()
            value = f"({value})" if kind == "bool" else value
            constants += f"enum {{ {word} = {value} }};"
    text = text.replace("[[kernel]] void", f"{constants} kernel void", 1)
    return f'#include <metal_stdlib>\n#line 1 "{name}.metal"\n{text}'


def require_metal(text: str, name: str) -> None:
    """Raise if a text has C++ that Metal refuses."""
    tokens = _tokens(text)
    rules.require(tokens, text, name)
    _require_constant_space(tokens, text, name)


def _tokens(text: str) -> list[_Token]:
    found = (m for m in _TOKEN.finditer(text) if m.lastgroup != "skip")
    return [_Token(m.lastgroup or "", m.group(), m.start(), m.end()) for m in found]


def _apply(text: str, edits: _Edits) -> str:
    out: list[str] = []
    at = 0
    for start, end, new in sorted(edits):
        if start < at:  # inside text that another edit removed
            continue
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
        done = last
        if before == "operator":  # a conversion to it is declared
            continue
        name = text[tokens[i].start : tokens[last].end]
        if before == "<" and i > 1 and tokens[i - 2].text == "static_cast":
            edits.append((tokens[i - 2].start, tokens[last + 1].end, f"mhc::make<{name}>"))
        elif before == "(" and tokens[last + 1].text == ")" and _is_cast(tokens, i - 1, last + 2):
            edits.append((tokens[i - 1].start, tokens[last + 1].end, f"mhc::to<{name}>()->*"))
        elif tokens[last + 1].text == "(":
            edits.append((tokens[i].start, tokens[last].end, f"mhc::make<{name}>"))
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


def _whole_copies(tokens: list[_Token]) -> _Edits:
    edits: _Edits = []
    for i in range(1, len(tokens) - 5):
        if tokens[i].text != "*" or tokens[i + 1].text != "(" or tokens[i - 1].text not in ";{}":
            continue
        end = _matching(tokens, i + 1)
        if [t.text for t in tokens[end + 1 : end + 4]] != ["=", "*", "("]:
            continue
        last = _matching(tokens, end + 3) + 1
        if tokens[last].text == ";":
            edits.append((tokens[i].start, tokens[i].end, "mhc::assign("))
            edits.append((tokens[end + 1].start, tokens[end + 2].end, ","))
            edits.append((tokens[last].start, tokens[last].start, ")"))
    return edits


# ---- parameters and their attributes -------------------------------------------------------------


def _parameters_of_arrays(tokens: list[_Token]) -> _Edits:
    edits: _Edits = []
    open_ = ""  # of the brackets around a token
    for i, token in enumerate(tokens):
        if token.text in _SPACES and open_.endswith("("):
            end = _next_at_depth_0(tokens, i, (",", ")", ";"))
            first = next((k for k in range(i, end) if tokens[k].text == "["), end)
            if (
                first + 1 < end
                and tokens[first + 1].text != "["
                and tokens[first - 1].kind == "word"
            ):
                name, last = tokens[first - 1], _matching(tokens, first)
                edits.append((name.start, tokens[last].end, f"*{name.text}"))
        if token.text in "([{":
            open_ += token.text
        elif token.text in ")]}":
            open_ = open_[:-1]
    return edits


def _attributes(text: str) -> _Edits:
    found = re.finditer(r"\[\[(function_constant|threadgroup)\(\w+\)\]\]", text)
    return [(m.start(), m.end(), "= {}" if m[1] == "function_constant" else "") for m in found]


# ---- member functions ----------------------------------------------------------------------------


def _members_of_other_spaces(tokens: list[_Token], text: str) -> _Edits:
    edits: _Edits = []
    for i, token in enumerate(tokens):
        if token.text not in _SPACES or i + 1 >= len(tokens):
            continue
        after = tokens[i - 2 if tokens[i - 1].text == "const" else i - 1].text
        if after != ")" or tokens[i + 1].text not in ("{", ":", ";"):
            continue
        first = i
        while first > 0 and tokens[first - 1].text not in (";", "{", "}"):
            first -= 1
        last = _end_of_function(tokens, i + 1)
        start, end = tokens[first].start, tokens[last].end
        if not edits or start >= edits[-1][1]:
            edits.append((start, end, "\n" * text.count("\n", start, end)))
    return edits


def _end_of_function(tokens: list[_Token], first: int) -> int:
    """Return the index of the last token of a function whose body, or ``: a(b)``, starts here."""
    opening = _next_at_depth_0(tokens, first, ("{", ";"))
    return opening if tokens[opening].text == ";" else _matching(tokens, opening)


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
    open_: list[str] = []  # of the brackets around a token; those of a namespace are "n"
    initialiser = False
    spaces = {"constant", *re.findall(r"^#define (\w+) [^\n]*\bconstant\b", text, re.MULTILINE)}
    for token in tokens:
        if token.text in "({[":
            if token.text == "{" and set(open_) <= {"n"}:
                initialiser = bool(statement) and statement[-1].text == "="
                if any(word.text == "namespace" for word in statement):
                    open_.append("n")
                    statement = []
                    continue
            open_.append(token.text)
        elif token.text in ")}]" and open_ and open_.pop() == "n":
            statement = []
            continue
        if not set(open_) <= {"n"}:
            continue
        if token.text == ";" and _is_plain_variable(statement, spaces):
            line = text.count("\n", 0, statement[0].start) + 1
            raise CompileError(
                f"{name}.metal:{line}: error: program scope variable must reside in constant "
                f"address space: {' '.join(t.text for t in statement)!r}"
            )
        ends = token.text == ";" or (token.text == "}" and not initialiser)
        statement = [] if ends else [*statement, token]


def _is_plain_variable(statement: list[_Token], spaces: set[str]) -> bool:
    words = [t.text for t in statement]
    other = {"using", "typedef", "template", "struct", "class", "enum", "namespace", *spaces}
    return "=" in words and not other & set(words) and "static_assert" not in words
