"""The verdicts of clang's front end on a text, in several languages, and the names in the text.

No code is generated here. :func:`metal` reads the simulator's own language, C++17 with a shim of
Apple's library; :func:`cxx14` the language that Metal extends (MSL specification 1.5), with every
later extension an error; :func:`opencl` C++ for OpenCL, in which the address spaces and ``half``
are keywords of clang, as they are of Apple's compiler.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mhc_metal_simulator.compiler import find_compiler, front_end, readable
from mhc_metal_simulator.errors import CompileError
from mhc_metal_simulator.source import prepare, prepare_declarations, prepare_opencl, require_metal

__all__ = ["Declared", "calls", "cxx14", "metal", "missing_opencl", "opencl"]

_SHIM = Path(__file__).parent / "metal"
_QUIET = "-fno-caret-diagnostics -fno-color-diagnostics -ferror-limit=0"
_CXX17 = """
    -x c++ -std=c++17 -nostdinc -fno-exceptions -fno-rtti -Xclang -cl-single-precision-constant
"""
_CXX14 = """
    -x c++ -std=c++14 -nostdinc -fno-exceptions -fno-rtti -Xclang -cl-single-precision-constant
    -fsyntax-only -pedantic-errors -Werror=c++17-extensions -Werror=c++20-extensions
    -Werror=c++23-extensions -Werror=c++26-extensions
    -Wno-duplicate-decl-specifier -Wno-unknown-attributes -Wno-ignored-attributes
"""
_OPENCL = """
    -x clcpp -cl-std=clc++2021 -cl-no-stdinc -nostdinc -fsyntax-only -Wno-everything
    -Xclang -cl-single-precision-constant
"""


def _run(flags: str, text: str, *more: str, name: str = "-") -> subprocess.CompletedProcess[str]:
    command = [*find_compiler().clang, *flags.split(), *_QUIET.split(), *more, name]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def metal(text: str, name: str = "text") -> None:
    """Raise unless the simulator's front end accepts a text, which need not have a kernel.

    It may contain MLX's own headers, whose functions of bfloat are not the shim's.
    """
    require_metal(text, name)
    front_end(prepare_declarations(text, name), f"{name}.metal", text)


# ---- what a text declares ------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """A name that a text declares.

    ``shared`` is true of a name in a namespace, where it can collide with Apple's names.
    """

    name: str
    kind: str  # clang's: FunctionDecl, ParmVarDecl and so on
    shared: bool


_SPACE = {"1": "device", "2": "constant", "3": "threadgroup"}
_MARK = "mhc_the_text_begins"
_NODE = re.compile(r"^([ |`-]*)(\w+Decl) 0x[0-9a-f]+ (.*)$")
_LOCATION = re.compile(r"^<[^>]*(?:<[^>]*>[^>]*)*> (?:(?:line|col|[^\s:']+):[\d:]+ |<[^>]*> )?")
_SPACES = {"TranslationUnitDecl", "NamespaceDecl", "FunctionTemplateDecl", "ClassTemplateDecl",
           "EnumDecl", "LinkageSpecDecl", "VarTemplateDecl", "TypeAliasTemplateDecl"}  # fmt: skip
_NAMELESS = {"UsingDirectiveDecl", "UsingDecl", "UsingShadowDecl", "StaticAssertDecl", "EmptyDecl",
             "FriendDecl", "AccessSpecDecl", "CXXConstructorDecl", "CXXDestructorDecl",
             "ImplicitParamDecl", "LinkageSpecDecl", "TypeAliasTemplateDecl"}  # fmt: skip
_WORDS = re.compile(r"(?:(?:implicit|referenced|used|invalid|prev 0x\w+|parent 0x\w+) )*")


def cxx14(text: str, name: str) -> tuple[list[Declared], set[str]]:
    """Return the names that MLX's text for a kernel declares, in uninstantiated templates too.

    Also return the pointers that it converts to integers (``conversion: device pointer to
    integer``). Raise unless the text, without the shim, is C++14 without later extensions.
    """
    code = prepare(text, name, marked=False).text.replace("#line 1", f"struct {_MARK};\n#line 1", 1)
    done = _run(f"{_CXX14} -Xclang -ast-dump", code, f"-isystem{_SHIM}")
    if done.returncode != 0:
        raise CompileError(readable(done.stderr))
    lines = done.stdout.splitlines()
    return list(dict.fromkeys(_declarations(lines))), set(_conversions(lines))


def _declarations(lines: list[str]) -> Iterator[Declared]:
    parents: list[tuple[int, str]] = []
    begun = False
    for line in lines:
        if not (found := _NODE.match(line)):
            continue
        depth, kind, rest = len(found[1]), found[2], found[3]
        begun = begun or _MARK in rest
        while parents and parents[-1][0] >= depth:
            parents.pop()
        outer = {parent for _, parent in parents}
        parents.append((depth, kind))
        word = _declared_name(kind, rest) if begun and kind not in _NAMELESS else None
        if word is not None and not word.startswith(("mhc_", "custom_kernel_")):
            yield Declared(word, kind, outer <= _SPACES and "ParmDecl" not in kind)


def _conversions(lines: list[str]) -> Iterator[str]:
    begun = False
    for k, line in enumerate(lines):
        begun = (begun or _MARK in line) and "mhc_kernel_entry" not in line  # the last function
        if begun and "<PointerToIntegral>" in line:
            what = lines[k + 1]  # that is converted; clang says the macro's name where there is one
            found = re.search(r"address_space\((\d)\)|'.*?\b(device|constant|threadgroup)\b", what)
            space = (found[2] or _SPACE[found[1]]) if found else "thread"
            yield f"conversion: {space} pointer to integer"


def _declared_name(kind: str, rest: str) -> str | None:
    rest = _LOCATION.sub("", rest, count=1)
    if rest.startswith("implicit "):
        return None
    rest = _WORDS.sub("", rest, count=1)
    if "ParmDecl" in kind:
        found = re.search(r"index \d+ (?:\.\.\. )?(\w+)", rest)
    elif kind in ("CXXRecordDecl", "ClassTemplateSpecializationDecl", "EnumDecl",
                  "ClassTemplatePartialSpecializationDecl"):  # fmt: skip
        found = re.match(r"(?:struct |class |union )?(\w+)(?: definition| '|$)", rest)
        found = None if found and found[1] in ("struct", "class", "union", "definition") else found
    else:
        found = re.match(r"(\w+)(?: |$)", rest)
    return found[1] if found else None


# ---- what a text calls ---------------------------------------------------------------------------

_FUNCTION = re.compile(r"^define .*?@([\w.]+)\(")
_CALL = re.compile(r"\bcall .*?@(_Z\w+)\(")
_HERE = re.compile(r"(?:, )?uint, uint\)( const)?$")  # the two last parameters are the shim's own
_SHIM_NAMES = ("_ZN5metal", "_ZNK5metal", "_ZN3mhc", "_ZNK3mhc")


def calls(text: str, name: str) -> set[str]:
    """Return the overloads of Metal that MLX's text for a kernel calls, with their types.

    These are functions, such as ``simd_sum(float)``; vectors made of others
    (``float2(float, float)``); threadgroup arrays (``threadgroup float[]``); and pointers outside
    of thread memory as which arguments of the text's own templates are deduced
    (``deduced: const float device*``).
    """
    code = prepare(text, name, marked=False).text
    flags = f"{_CXX17} -Wno-everything -S -emit-llvm -Xclang -disable-llvm-passes"
    done = _run(flags, code, f"-I{_SHIM}", "-o", "-")
    if done.returncode != 0:
        raise CompileError(readable(done.stderr))
    found: set[str] = set()
    own = False
    for line in done.stdout.splitlines():
        if function := _FUNCTION.match(line):
            own = not function[1].startswith((*_SHIM_NAMES, "mhc_", "_GLOBAL_", "__cxx"))
        if not own:
            continue
        for symbol in _CALL.findall(line):
            if symbol.startswith(_SHIM_NAMES):
                found.add(_overload(_demangled(symbol)))
            elif "U3AS" in symbol:
                found.update(f"deduced: {pointer}" for pointer in _pointers(_demangled(symbol)))
    return found


def _pointers(demangled: str) -> Iterator[str]:
    """Yield the pointers among the template arguments, not those among the parameters."""
    opening = demangled.find("<")
    inside = demangled[opening : _close(demangled, opening)] if opening >= 0 else ""
    for type_, const, space in re.findall(r"(\w+)( const)? AS(\d)\*", inside):
        yield f"{'const ' if const else ''}{type_} {_SPACE[space]}*"


def _close(text: str, opening: int) -> int:
    """Return the index of the bracket that closes the one at ``opening``."""
    left, right = text[opening], {"<": ">", "(": ")"}[text[opening]]
    depth = 0
    for k in range(opening, len(text)):
        depth += (text[k] == left) - (text[k] == right)
        if depth == 0:
            return k
    return len(text)


def _overload(demangled: str) -> str:
    """Return an overload without its result, its template arguments and the shim's own parts."""
    if shared := re.search(r"mhc::shared<(\w+) ?[\[,]", demangled):
        return f"threadgroup {shared[1]}[]"
    if made := re.search(r"mhc::make<(\w+)", demangled):
        return made[1] + demangled[demangled.rindex("(") :]
    plain = _HERE.sub(r")\1", demangled).replace("metal::", "")
    if named := re.match(r"\w+&? (as_type<\w+)", plain):
        return f"{named[1]}>{plain[plain.rindex('(') :]}"
    if templated := re.match(r"\w+&? (\w+)<", plain):
        return templated[1] + plain[_close(plain, templated.end(1)) + 1 :]
    return plain


@functools.cache
def _demangled(symbol: str) -> str:
    # The narrow types become two types that Metal lacks and every library can demangle.
    symbol = symbol.replace("DF16b", "g").replace("DF16_", "e")
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    status = ctypes.c_int()
    raw = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not raw:
        raise CompileError(f"the name {symbol} cannot be read")
    text = ctypes.string_at(raw).decode()
    library.free(raw)
    text = text.replace("__float128", "bfloat").replace("long double", "half")
    text = re.sub(r"unsigned (int|short|char|long)", r"u\1", text)
    return re.sub(r"(\w+) __vector\((\d+)\)", r"\1\2", text)


# ---- C++ for OpenCL ------------------------------------------------------------------------------


@functools.cache
def missing_opencl() -> str | None:
    """Return why this clang has no C++ for OpenCL, or None."""
    done = _run(_OPENCL, "__kernel void f(__global int* p) { *p = 1; }")
    return None if done.returncode == 0 else f"clang has no C++ for OpenCL: {done.stderr.strip()}"


def opencl(text: str, name: str) -> None:
    """Raise unless MLX's text for a kernel is C++ for OpenCL, behind a prelude.

    Its template becomes a plain kernel with the arguments of the instance, as OpenCL has no kernels
    that are templates.
    """
    done = _run(_OPENCL, prepare_opencl(text, name), f"-I{_SHIM / 'opencl'}")
    if done.returncode != 0:
        raise CompileError(done.stderr.strip())
