"""The C++ that Metal refuses, found in a text's tokens before clang reads it.

Each rule cites the evidence that Apple's compiler refuses this: a public issue with its message, or
a section of the Metal Shading Language specification (numbers as in version 3.1). Tests check that
the rules accept MLX's own headers, as that compiler does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mhc_metal_simulator.branches import Token
from mhc_metal_simulator.errors import CompileError

__all__ = ["ADDRESS_SPACES", "MAIN_KEYWORDS", "NOT_IN_METAL", "require"]

ADDRESS_SPACES = frozenset(
    {"device", "constant", "thread", "threadgroup", "threadgroup_imageblock", "ray_data",
     "object_data"}
)  # fmt: skip
MAIN_KEYWORDS = frozenset({"kernel", "vertex", "fragment"})

NOT_IN_METAL = {
    # 1.4.4 Restrictions; naga #264: "'new' is not supported in Metal"
    "asm": "1.4.4",
    "catch": "1.4.4",
    "delete": "1.4.4",
    "dynamic_cast": "1.4.4",
    "goto": "1.4.4",
    "new": "1.4.4",
    "register": "1.4.4",
    "thread_local": "1.4.4",
    "throw": "1.4.4",
    "try": "1.4.4",
    "typeid": "1.4.4",
    "virtual": "1.4.4",
    # 2.1 Scalar Data Types
    "double": "2.1",
    "wchar_t": "2.1",
}
_TWO_WORDS = {("long", "long"), ("long", "double")}  # 2.1 Scalar Data Types

_SCALARS = frozenset(
    {"bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "float", "half",
     "bfloat", "size_t"}
)  # fmt: skip
_VECTORS = re.compile(
    r"(?:packed_)?(?:bool|u?char|u?short|u?int|u?long|float|half|bfloat)[234]\Z"
    r"|u?int(?:8|16|32|64)_t\Z"
)
_BEFORE = {"const", "volatile", "unsigned", "signed", "static", "constexpr", "inline", "typename",
           "struct", "metal", "::"}  # fmt: skip
_TYPE_WORDS = {"struct", "class", "union", "enum"}


def require(tokens: Sequence[Token], text: str, name: str) -> None:
    """Raise the first error that Apple's compiler reports and clang does not."""
    for token, message in sorted(_errors(tokens), key=lambda found: found[0].start):
        line = text.count("\n", 0, token.start) + 1
        raise CompileError(f"{name}.metal:{line}: error: {message}")


def _errors(tokens: Sequence[Token]) -> Iterator[tuple[Token, str]]:
    yield from _unsupported(tokens)
    yield from _keywords_as_names(tokens)
    yield from _pointers_without_space(tokens)
    yield from _threadgroup_variables(tokens)


def _unsupported(tokens: Sequence[Token]) -> Iterator[tuple[Token, str]]:
    for k, token in enumerate(tokens):
        after = tokens[k + 1].text if k + 1 < len(tokens) else ""
        if token.kind == "word" and token.text in NOT_IN_METAL:
            yield token, f"'{token.text}' is not supported in Metal"
        if (token.text, after) in _TWO_WORDS:
            yield token, f"'{token.text} {after}' is not supported in Metal"
        if token.text == "main" and after == "(":
            yield token, "a function of Metal cannot be called main"


def _keywords_as_names(tokens: Sequence[Token]) -> Iterator[tuple[Token, str]]:
    """Find ``uint3 thread = ...``; SPIRV-Cross #2073: "expected unqualified-id"."""
    for k, token in enumerate(tokens[:-1]):
        if token.kind != "word" or token.text not in ADDRESS_SPACES | MAIN_KEYWORDS:
            continue
        before, after = tokens[k - 1] if k else token, tokens[k + 1].text
        declared = after in ("=", "[", ".", "+=") and before.text not in ("[", ",")
        # or "float device;", but not "T f() const device;", nor the argument of a macro
        ends = after in (",", ";", ")") and before.kind == "word" and before.text != "const"
        if declared or ends or before.text == ".":
            yield token, f"expected unqualified-id: '{token.text}' is a keyword"


def _pointers_without_space(tokens: Sequence[Token]) -> Iterator[tuple[Token, str]]:
    """Find ``float* p``; llama.cpp #3898, hashcat #3540, #4237: the message below."""
    own = {
        tokens[k + 1].text
        for k, token in enumerate(tokens[:-2])
        if token.text in ("struct", "class") and tokens[k + 2].text in ("{", ":", "<")
    }
    for k, token in enumerate(tokens):
        name = token.text
        if token.kind != "word" or not (
            name in _SCALARS or name == "void" or name in own or _VECTORS.match(name)
        ):
            continue
        first, last, spaced = k, k + 1, False
        while first and (tokens[first - 1].text in _BEFORE | ADDRESS_SPACES):
            first -= 1
            spaced = spaced or tokens[first].text in ADDRESS_SPACES
        if name in own and last < len(tokens) and tokens[last].text == "<":
            last = _past_angles(tokens, last)
        while last < len(tokens) and tokens[last].text in {"const", "volatile"} | ADDRESS_SPACES:
            spaced = spaced or tokens[last].text in ADDRESS_SPACES
            last += 1
        sign = tokens[last].text if last < len(tokens) else ""
        again = tokens[last + 1].text if last + 1 < len(tokens) else ""
        if sign in ("*", "&") and not spaced and again != sign:
            what = "pointer" if sign == "*" else "reference"
            yield (
                token,
                f"{what} type must have explicit address space qualifier: "
                "device, constant, threadgroup or thread",
            )


def _past_angles(tokens: Sequence[Token], opening: int) -> int:
    depth = 0
    for k in range(opening, len(tokens)):
        depth += (tokens[k].text == "<") - (tokens[k].text == ">")
        if depth == 0:
            return k + 1
        if tokens[k].text in (";", "{"):
            return opening
    return opening


def _threadgroup_variables(tokens: Sequence[Token]) -> Iterator[tuple[Token, str]]:
    """Find threadgroup variables outside kernels or with a value; 4.4 threadgroup Address Space."""
    frames: list[str] = []
    statement: list[str] = []
    parentheses = 0
    for k, token in enumerate(tokens):
        starts = not statement and parentheses == 0
        if token.text == "threadgroup" and starts and _is_variable(tokens, k):
            inside = [frame for frame in frames if frame in ("function", "kernel")]
            if inside and inside[0] != "kernel":
                yield token, "a variable of threadgroup memory must be declared in a kernel"
        parentheses += (token.text in "([") - (token.text in ")]")
        if token.text == "{" and parentheses == 0:
            frames.append(_frame(statement, frames))
            statement = []
        elif token.text == "}" and parentheses == 0:
            if frames:
                frames.pop()
            statement = []
        elif token.text == ";" and parentheses == 0:
            statement = []
        else:
            statement.append(token.text)


def _frame(statement: list[str], frames: list[str]) -> str:
    if "namespace" in statement or "extern" in statement:
        return "namespace"
    if _TYPE_WORDS & set(statement) and "(" not in statement:
        return "type"
    outside = all(frame in ("namespace", "type") for frame in frames)
    if outside and "(" in statement:
        return "kernel" if "kernel" in statement else "function"
    return "block"


def _is_variable(tokens: Sequence[Token], first: int) -> bool:
    """Return whether a declaration is of a variable, not of a pointer or a function."""
    depth = 0
    for token in tokens[first + 1 :]:
        depth += (token.text in "([<") - (token.text in ")]>")
        if (token.text in ("*", "&") and depth == 0) or token.text in ("(", "{"):
            return False
        if token.text in (";", "="):
            return True
    return False
