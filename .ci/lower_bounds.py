"""Print the oldest versions that pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where Python does not

FILE = Path(__file__).parent.parent / "pyproject.toml"


def lowest(requirement: str) -> str:
    """Return ``name==version`` for ``name[extra]>=version; marker``."""
    wanted, _, marker = requirement.partition(";")
    found = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)(?:,<[\w.]+)?", wanted.strip())
    if not found:
        raise SystemExit(f"{requirement!r} has no lower bound")
    return f"{found[1]}=={found[2]}" + (f"; {marker.strip()}" if marker else "")


def constraints() -> Iterator[str]:
    """Yield each requirement of the project, its extras and its build once."""
    found = tomllib.loads(FILE.read_text(encoding="utf-8"))
    project = found["project"]
    wanted = [*found["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += [one for one in extra if not one.startswith(project["name"])]
    yield from dict.fromkeys(map(lowest, wanted))


if __name__ == "__main__":
    print(*constraints(), sep="\n")
