"""Compile every text of the kernels with Apple's compiler, which needs a Mac and no GPU.

    python .ci/compile_metal.py FOLDER LOG

The texts are those that ``python -m mhc_metal_simulator.texts FOLDER`` writes. Each is compiled as
Metal 3.1 and as Metal 3.2, without fast math, as MLX compiles its own kernels. The log has what the
compiler says of each; the exit status is 1 if it refuses one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STANDARDS = ("metal3.1", "metal3.2")
METAL = ("xcrun", "-sdk", "macosx", "metal")
DOWNLOAD = ("xcodebuild", "-downloadComponent", "MetalToolchain")  # apart from Xcode since Xcode 26


def run(command: Sequence[str]) -> tuple[int, str]:
    """Return a command's exit status and everything that it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return 127, f"{command[0]}: {error}"
    return done.returncode, (done.stdout + done.stderr).strip()


def compiler() -> str:
    """Return the compiler's version; download the compiler first if Xcode comes without it."""
    for prepare in (None, DOWNLOAD):
        if prepare is not None:
            run(prepare)
        status, said = run([*METAL, "--version"])
        if status == 0:
            return said
    sys.exit(f"Apple's compiler for Metal is not here: {' '.join(METAL)} --version: {said}")


def compiled(file: Path, standard: str, folder: str) -> tuple[int, str]:
    """Compile one text in one version of the language."""
    out = str(Path(folder) / f"{file.stem}-{standard}.air")
    return run([*METAL, f"-std={standard}", "-fno-fast-math", "-c", str(file), "-o", out])


def main(folder: Path, log: Path) -> int:
    """Compile all texts and return the exit status."""
    files = sorted(folder.glob("*.metal"))
    if not files:
        sys.exit(f"there is no text in {folder}: python -m mhc_metal_simulator.texts {folder}")
    version = compiler()
    jobs = [(file, standard) for standard in STANDARDS for file in files]
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: compiled(*job, out), jobs))
    refused = 0
    lines = [version, ""]
    for (file, standard), (status, said) in zip(jobs, done, strict=True):
        refused += status != 0
        lines.append(f"{'refused' if status else 'taken'}: {standard} {file.name}")
        lines += [said, ""] if said else []
    lines.append(f"{len(jobs) - refused} of {len(jobs)} taken, {refused} refused")
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[-1])
    if refused:
        first = next(said for status, said in done if status)
        print(f"the first of them:\n{first}")
    return 1 if refused else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
