"""The search for a clang, and the disk cache of libraries that it compiles from prepared texts.

The front end sees the real address spaces, so that a mismatch is a compile error. They are then
erased from its output, LLVM's textual intermediate code, because clang instruments loads and stores
in the plain address space only. The rest of the compiler gets that code.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mhc_metal_simulator.errors import CompileError, SimulatorError, SimulatorUnavailableError
from mhc_metal_simulator.source import Prepared

__all__ = [
    "Compiler",
    "cache_folder",
    "compile_kernel",
    "find_compiler",
    "front_end",
    "readable",
]

OLDEST_CLANG = 18
_HERE = Path(__file__).parent
_SEAL = b"\0mhc-sha256\0"  # precedes the hash at the end of a cache entry
_STACK_BYTES = 200_000  # of a thread's 256 KiB stack, for the kernel's own variables

_LANGUAGE = """
    -x c++ -std=c++17 -nostdinc -fno-exceptions -fno-rtti -fno-threadsafe-statics
    -fPIC -fvisibility=hidden -O1 -ffp-contract=off -fno-math-errno -fno-lax-vector-conversions
    -Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none
"""
# Locals start as NaN or an odd number, not as whatever is in memory.
_FRONT_END = f"""
    -Xclang -cl-single-precision-constant -ftrivial-auto-var-init=pattern -fno-strict-aliasing
    -fsanitize=kernel-address,array-bounds,integer-divide-by-zero -fno-sanitize-trap=all
    -Wno-everything -Werror=return-type -Werror=uninitialized -Wimplicit-float-conversion
    -Wframe-larger-than={_STACK_BYTES} -fno-caret-diagnostics -fno-color-diagnostics
    -gline-tables-only -S -emit-llvm -Xclang -disable-llvm-passes
"""
# Every access as a call, none merged with or skipped for another. With a mapping scale of 4, the
# calls that name a size (__asan_load16 and the like) stand for accesses aligned to that size.
_BACK_END = f"""
    -x ir -O1 -fPIC -fsanitize=kernel-address -fno-vectorize -fno-slp-vectorize -c
    -mllvm -asan-instrumentation-with-call-threshold=0 -mllvm -asan-globals=0
    -mllvm -asan-stack=0 -mllvm -asan-opt-same-temp=0 -mllvm -asan-mapping-scale=4
    -mllvm -asan-kernel-mem-intrinsic-prefix=1
    -Wno-everything -Wframe-larger-than={_STACK_BYTES}
"""
_RUNTIME = "-O2 -c"


@dataclass(frozen=True)
class Compiler:
    """A clang and a linker, as command lines."""

    clang: tuple[str, ...]
    linker: tuple[str, ...]
    version: str


@functools.cache
def find_compiler() -> Compiler:
    """Return ``MHC_SIMULATOR_CLANG``, else a system clang, else the one in the ziglang wheel."""
    named = os.environ.get("MHC_SIMULATOR_CLANG")
    if named:
        found = _zig() if named == "ziglang" else _system_clang(named)
        if found is None:
            raise SimulatorUnavailableError(
                f"MHC_SIMULATOR_CLANG is {named!r}, which is no clang of version {OLDEST_CLANG} or "
                "later; name one, or 'ziglang' for the one in the ziglang wheel"
            )
        return found
    names = ["clang", *(f"clang-{version}" for version in range(30, OLDEST_CLANG - 1, -1))]
    for found in (*map(_system_clang, names), _zig()):
        if found is not None:
            return found
    raise SimulatorUnavailableError(
        f"the simulator needs a clang of version {OLDEST_CLANG} or later; install one, or "
        "`pip install ziglang`, which brings one along"
    )


def _system_clang(name: str) -> Compiler | None:
    path = shutil.which(name)
    if path is None:
        return None
    version = _run([path, "--version"]).stdout
    found = re.search(r"clang version (\d+)", version)
    if found is None or int(found.group(1)) < OLDEST_CLANG:
        return None
    linker = shutil.which("ld")  # takes a tenth of the time in which clang would call it
    return Compiler(
        (path,), (linker, "-shared") if linker else (path, "-shared", "-nostdlib"), version
    )


def _zig() -> Compiler | None:
    try:
        import ziglang  # pyright: ignore[reportMissingTypeStubs, reportMissingImports]
    except ImportError:
        return None
    zig = str(Path(str(ziglang.__file__)).parent / "zig")
    # Not `zig c++`: that would first build a C++ runtime, which takes minutes and is not needed.
    version = _run([zig, "clang", "--version"]).stdout
    return Compiler((zig, "clang"), (zig, "ld.lld", "-shared"), version)


def _run(command: list[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)


# ---- the cache -----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of compiled kernels, made private to this user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("MHC_SIMULATOR_CACHE") or Path(base) / "mhc-metal-simulator")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        raise SimulatorError(
            f"the folder of compiled kernels, {folder}, is open to others or belongs to someone "
            "else, and libraries are loaded from it; `chmod 700` it, or name another one in "
            "MHC_SIMULATOR_CACHE"
        )
    return folder


@functools.cache
def _shim_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_HERE.glob("metal/**/*")) + sorted(_HERE.glob("runtime/*")):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(compiler: Compiler, text: str) -> str:
    parts = (_shim_digest(), compiler.version, _LANGUAGE, _FRONT_END, _BACK_END, _RUNTIME, text)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def compile_kernel(prepared: Prepared) -> Path:
    """Return the shared library of a prepared text, compiled now or earlier."""
    compiler = find_compiler()
    folder = cache_folder()
    library = folder / f"{_key(compiler, prepared.text)}.so"
    if _is_whole(library):
        return library
    runtime = _runtime_object(compiler, folder)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        _keep(_build(compiler, prepared, runtime, Path(work)), library)
    return library


def _runtime_object(compiler: Compiler, folder: Path) -> Path:
    target = folder / f"{_key(compiler, 'runtime')}.o"
    if _is_whole(target):
        return target
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = Path(work) / "runtime.o"
        source = str(_HERE / "runtime" / "runtime.cpp")
        _check([*compiler.clang, *_LANGUAGE.split(), *_RUNTIME.split(), source, "-o", str(built)])
        _keep(built, target)
    return target


def _keep(built: Path, entry: Path) -> None:
    """Write a file into the cache, sealed with its hash; linkers do not look behind an ELF file."""
    with built.open("ab") as stream:
        stream.write(_SEAL + _digest(built.read_bytes()))
    os.replace(built, entry)


def _is_whole(entry: Path) -> bool:
    """Return whether an entry exists and is intact: loading a truncated library is a bus error."""
    try:
        content = entry.read_bytes()
    except OSError:
        return False
    built, seal, digest = content.rpartition(_SEAL)
    return bool(seal) and digest == _digest(built)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


# ---- compiling -----------------------------------------------------------------------------------


def front_end(text: str, file: str, original: str) -> str:
    """Return clang's intermediate code of a prepared text, if Metal accepts it."""
    flags = f"{_LANGUAGE} {_FRONT_END} -I{_HERE / 'metal'} -o - -"
    done = _run([*find_compiler().clang, *flags.split()], text)
    if done.returncode != 0:
        raise CompileError(readable(done.stderr))
    _require_explicit_bfloat(done.stderr)
    _require_one_space(done.stdout, file, original)
    return done.stdout


def _build(compiler: Compiler, prepared: Prepared, runtime: Path, work: Path) -> Path:
    plain, object_, library = (work / name for name in ("plain.ll", "kernel.o", "kernel.so"))
    code = front_end(prepared.text, prepared.file, prepared.original)
    # every pointer in the plain address space
    plain.write_text(re.sub(r" addrspace\(\d+\)", "", code))
    said = _check([*compiler.clang, *_BACK_END.split(), str(plain), "-o", str(object_)])
    _require_small_frames(said, prepared)
    _check([*compiler.linker, str(object_), str(runtime), "-o", str(library)])
    return library


def _check(command: list[str]) -> str:
    done = _run(command)
    if done.returncode != 0:
        raise CompileError(readable(done.stderr))
    return done.stderr


def readable(said: str) -> str:
    """Return clang's message in Metal's words."""
    for number, name in ((1, "device"), (2, "constant"), (3, "threadgroup")):
        said = said.replace(f"__attribute__((address_space({number})))", name)
    return said.replace("_Float16", "half").replace("__bf16", "bfloat").strip()


def _require_explicit_bfloat(said: str) -> None:
    """Refuse what Apple's compiler refuses and clang allows: float to bfloat without a cast."""
    for line in said.splitlines():
        if "loses floating-point precision" in line and re.search(
            r"to '(?:\w+' \(aka ')?(?:__bf16|bfloat)", line
        ):
            raise CompileError(readable(line.replace("warning:", "error:")) + "; write bfloat(x)")


def _require_small_frames(said: str, prepared: Prepared) -> None:
    found = re.search(r"stack frame size \((\d+)\)", said)
    if found:
        raise CompileError(
            f"{prepared.file}: error: a thread's own variables take {found.group(1)} bytes; the "
            f"simulator has {_STACK_BYTES} for them, and a GPU far fewer"
        )


def _require_one_space(code: str, file: str, original: str) -> None:
    """Refuse a C-style cast from one space to another, which clang allows and Metal does not."""
    for line in code.splitlines():
        if "addrspacecast" in line:
            where = _location(line, code)
            text = original.splitlines()[where - 1].strip() if where else line.strip()
            raise CompileError(
                f"{file}:{where}: error: cast converts between mismatching address spaces: {text}"
            )


def _location(instruction: str, code: str) -> int | None:
    found = re.search(r"!dbg !(\d+)", instruction)
    if found is None:
        return None
    line = re.search(rf"^!{found.group(1)} = .*DILocation\(line: (\d+)", code, re.MULTILINE)
    return int(line.group(1)) if line else None
