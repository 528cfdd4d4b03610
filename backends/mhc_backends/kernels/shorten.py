"""The shortening of the common text to what a kernel uses, without comments.

MLX hashes a kernel's text at every launch, 0.3 us for each KiB (its custom_kernel.cpp), so a kernel
gets only the text that it needs: the definitions whose names it mentions, and those that they
mention in turn.
"""

from __future__ import annotations

import functools
import re

__all__ = ["shorten"]

_DEFINES = re.compile(
    r"""
    ^(?:template\s*<[^\n]*>\s)?\s*
    (?: \#define\s+(\w+)                      # a macro
    | struct\s+(\w+)
    | typedef\b[^;]*?\b(\w+);
    | enum\s*\{([^}]*)\}                     # its words
    | FUNCTION\b[^;{}()]*?\b(\w+)\( )       # a function, whatever it returns
    """,
    re.MULTILINE | re.VERBOSE,
)
_WORD = re.compile(r"[A-Za-z_]\w*")
_CALL = re.compile(r"([A-Za-z_]\w*)\s*[(<]")


@functools.cache
def shorten(header: str, function: str, body: str) -> tuple[str, str]:
    """Return the definitions that a function and a body need, with the function, and the body.

    All are without comments.
    """
    function, body = _compact(function), _compact(body)
    return _needed(_compact(header), _uses(function) | _uses(body)) + function, body


def _compact(text: str) -> str:
    """Remove comments, indentation and empty lines."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def _needed(text: str, needs: set[str]) -> str:
    """Return the definitions that are needed, directly or by other needed ones, in their order."""
    definitions = _definitions(text)
    names = [_names(definition) for definition in definitions]
    kept = {k for k, own in enumerate(names) if not own}
    words = needs.union(*(_uses(definitions[k]) for k in kept))
    while more := {k for k, own in enumerate(names) if k not in kept and own & words}:
        kept |= more
        words.update(*(_uses(definitions[k]) for k in more))
    return "".join(definitions[k] for k in sorted(kept))


def _names(definition: str) -> set[str]:
    """Return the names that a definition defines, those of functions with a bracket.

    Only the first name counts, since names inside are local; but a macro may define several
    functions.
    """
    names: set[str] = set()
    for macro, struct, type_name, words, function in _DEFINES.findall(definition):
        names.update(name for name in (macro, struct, type_name) if name)
        names.update({f"{function}("} if function else ())
        names.update(_WORD.findall(re.sub(r"=[^,]*", "", words)))
        if not definition.startswith("#"):
            break
    return names


def _uses(text: str) -> set[str]:
    """Return the words of a text, those that may be calls with a bracket as well."""
    return {*_WORD.findall(text), *(f"{name}(" for name in _CALL.findall(text))}


def _definitions(text: str) -> list[str]:
    """Split a text wherever no brace, conditional or temporary macro is open."""
    definitions: list[str] = []
    current: list[str] = []
    braces = conditionals = 0
    ends = set(re.findall(r"^#undef (\w+)", text, re.MULTILINE))
    macro = ""
    for line in text.splitlines(keepends=True):
        current.append(line)
        code = line.strip()
        braces += code.count("{") - code.count("}")
        conditionals += code.startswith("#if") - code.startswith("#endif")
        if (found := re.match(r"#define (\w+)", code)) and found[1] in ends:
            macro = found[1]
        if macro and code == f"#undef {macro}":
            macro = ""
        directive = code.startswith("#") and not code.endswith("\\")
        whole = code.endswith((";", "}")) or directive
        if whole and not (braces or conditionals or macro):
            definitions.append("".join(current))
            current = []
    return [*definitions, "".join(current)] if current else definitions
