"""The layers of the code: who imports whom, with no circle and no underscore over a border.

``IMPORTS`` is the whole picture, an arrow a line. A new arrow is a decision: it is added here, or
the code finds another way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from layers import Import, circles, constants, imports, layer_of, modules, private

from mhc_core import machine

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "mhc_core": ROOT / "mhc_core",
    "mhc_conformance": ROOT / "conformance/mhc_conformance",
    "mhc_backends": ROOT / "backends/mhc_backends",
    "mhc_torch": ROOT / "plugins/mhc-torch/mhc_torch",
    "mhc_metal_simulator": ROOT / "plugins/mhc-metal-simulator/mhc_metal_simulator",
    "mhc_mlx": ROOT / "plugins/mhc-drop-in/mhc_mlx",
    "mlx_mhc": ROOT / "plugins/mhc-drop-in/mlx_mhc",
    "mhc_peers": ROOT / "plugins/mhc-peers/mhc_peers",
}

# From the ground up; a part of a package that stands on another floor has a line of its own.
LAYERS = (
    "mhc_core",
    "mhc_conformance",
    "mhc_backends",
    "mhc_core.mlx",  # the modules of mhc_backends, under a public name
    "mhc_core.jax",  # likewise
    "mhc_core.cli",
    "mhc_core.cli:app",  # the command itself
    "mhc_torch",
    "mhc_metal_simulator",
    "mhc_mlx",
    "mlx_mhc",
    "mhc_peers",
)

IMPORTS = [
    "mhc_conformance -> mhc_core",
    "mhc_backends -> mhc_core",
    "mhc_backends -> mhc_conformance",  # a backend's proof runs cases of the kit
    "mhc_core.mlx -> mhc_backends",
    "mhc_core.jax -> mhc_backends",
    "mhc_core.cli -> mhc_core",
    "mhc_core.cli -> mhc_conformance",
    "mhc_core.cli -> mhc_backends",
    "mhc_core.cli -> mhc_mlx",  # what mhc bench compares with: the original, where it is installed
    "mhc_core.cli -> mlx_mhc",  # likewise
    "mhc_torch -> mhc_core",
    "mhc_torch -> mhc_backends",  # kernels, plans, the cache; what modules of all libraries share
    "mhc_metal_simulator -> mhc_core",
    "mhc_metal_simulator -> mhc_conformance",
    "mhc_metal_simulator -> mhc_backends",
    "mhc_mlx -> mhc_core",
    "mhc_mlx -> mhc_core.mlx",
    "mlx_mhc -> mhc_core.mlx",
    "mlx_mhc -> mhc_backends",
    "mlx_mhc -> mhc_mlx",
    "mhc_peers -> mhc_core",
    "mhc_peers -> mhc_conformance",
    "mhc_peers -> mhc_mlx",  # the original, in a process that finds it before the drop-in
    "mhc_peers -> mlx_mhc",  # likewise
]

# Arrows that any plugin may have, without a line above.
COMMAND = "mhc_core.cli:app"

# Before there were layers: the arrows that ran upwards, the circles, and what was taken of another
# package under an underscore name. None may come back.
BEFORE = [
    "mhc_conformance -> mhc_core.cli",  # report.py took the machine's description
    "mhc_backends -> mhc_core.cli",  # mlx_nn/diagnostics.py ran mhc info
]
CIRCLES_BEFORE = [
    ["mhc_conformance.checks", "mhc_conformance.properties"],
    ["mhc_core", "mhc_core._api", "mhc_core._registry"],
]
PRIVATE_BEFORE = [
    "mhc_backends._mlx",
    "mhc_core._checks",
    "mhc_core._gradients",
    "mhc_core._registry",
    "mhc_core._signature",
    "mhc_core.cli._machine",
]

# Circles that an import inside a function closes, by the modules' beginnings, each with its reason.
LATE = {
    ("mhc_conformance.bugs", "mhc_conformance.generated"): (
        "a made mutant is a bug, and the name of a bug may be that of a made mutant"
    ),
    ("mhc_conformance.cases", "mhc_conformance.telling"): (
        "telling's cases are made of Case, and are among the cases of an op"
    ),
}


@pytest.fixture(scope="module")
def files() -> Mapping[str, Path]:
    """Return every module of the project, by name."""
    return modules(PACKAGES)


@pytest.fixture(scope="module")
def found(files: Mapping[str, Path]) -> list[Import]:
    """Return every import between two of them."""
    return imports(files)


def arrows(found: list[Import], layers: tuple[str, ...] = LAYERS) -> dict[str, str]:
    """Return an example of an import for every arrow between two layers."""
    drawn: dict[str, str] = {}
    for one in found:
        pair = layer_of(one.module, layers), layer_of(one.target, layers, one.name)
        if pair[0] != pair[1]:
            drawn.setdefault(" -> ".join(pair), str(one))
    return drawn


def without(found: list[Import], late: Mapping[tuple[str, str], str] = LATE) -> list[Import]:
    """Return the imports but for those that ``late`` excuses, which must be inside functions."""
    return [
        one
        for one in found
        if one.when == "at import"
        or not any(one.module.startswith(a) and one.target.startswith(b) for a, b in late)
    ]


# --- the project ------------------------------------------------------------------------------


def test_the_picture_is_the_code(found: list[Import]) -> None:
    drawn = arrows(found)
    new = [f"{arrow} ({drawn[arrow]})" for arrow in drawn if arrow not in IMPORTS]
    assert [arrow for arrow in new if COMMAND not in arrow] == []
    assert [arrow for arrow in IMPORTS if arrow not in drawn] == []


def test_only_plugins_import_the_command(found: list[Import]) -> None:
    plugins = ("mhc_torch", "mhc_metal_simulator", "mhc_mlx", "mlx_mhc")
    upwards = [arrow for arrow in arrows(found) if arrow.endswith(COMMAND)]
    assert [arrow for arrow in upwards if not arrow.startswith(plugins)] == []


def test_no_circle_in_a_package(found: list[Import]) -> None:
    assert circles([one for one in found if one.when == "at import"]) == []
    assert circles(without(found)) == []


def test_every_excuse_is_still_needed(found: list[Import]) -> None:
    for pair in LATE:
        others = {other: reason for other, reason in LATE.items() if other != pair}
        assert circles(without(found, others)), f"{pair} closes no circle: take it off LATE"


def test_no_package_takes_underscore_names_of_another(files: Mapping[str, Path]) -> None:
    assert private(files) == []


def test_what_was_crossed_before_is_not_crossed(
    files: Mapping[str, Path], found: list[Import]
) -> None:
    assert not set(BEFORE) & {*IMPORTS, *arrows(found)}
    assert not [ring for ring in CIRCLES_BEFORE if ring in circles(found)]
    assert not set(PRIVATE_BEFORE) & set(files)


# --- core knows no library --------------------------------------------------------------------

MAY_KNOW = ("mhc_core.math._xp", "mhc_core.mlx", "mhc_core.jax", "mhc_core.cli")
NAMES = re.compile(r"[\w.-]*(torch|dynamo|mlx|jax|numpy|metal|cuda)[\w.-]*", re.IGNORECASE)
KNOWN = {
    ("mhc_core", "mlx"): "the name of the lazy module",
    ("mhc_core", "jax"): "likewise",
    ("mhc_core._arrays", "numpy.ndarray"): "host arrays, which every backend converts",
    ("mhc_core.backend", "_dynamo_marked_constant"): "a mark in TRACE_TIME_MARKS",
}


def library_names(files: Mapping[str, Path]) -> set[tuple[str, str]]:
    """Return the strings in core's code that are a library's or a backend's name, by module."""
    return {
        (module, word)
        for module, file in files.items()
        if layer_of(module, LAYERS) == "mhc_core" and not module.startswith(MAY_KNOW)
        for _, word in constants(file)
        if NAMES.fullmatch(word)
    }


def test_core_names_no_library(files: Mapping[str, Path]) -> None:
    names = library_names(files)
    # whose versions a report has
    assert names - {("mhc_core.machine", package) for package in machine.PACKAGES} == set(KNOWN)


# --- the reader itself ------------------------------------------------------------------------


def made(folder: Path, sources: Mapping[str, str]) -> dict[str, Path]:
    """Write sources by path, such as "a/one", and return all modules of the packages there."""
    for name, source in sources.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return modules({child.name: child for child in folder.iterdir()})


@pytest.mark.parametrize(
    ("source", "target", "when"),
    [
        ("import b.x", "b.x", "at import"),
        ("from b import x", "b.x", "at import"),
        ("from b.x import y", "b.x", "at import"),
        ("from . import other", "a.other", "at import"),
        ("from .other import y", "a.other", "at import"),
        ("try:\n    import b.x\nexcept ImportError:\n    pass", "b.x", "at import"),
        ("def f():\n    from b import x", "b.x", "in a function"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import b.x", "b.x", "for types"),
        ("import importlib\nz = importlib.import_module('b.x')", "b.x", "at import"),
        ("def f():\n    return import_module('b.x')", "b.x", "in a function"),
    ],
)
def test_every_way_to_import_is_seen(tmp_path: Path, source: str, target: str, when: str) -> None:
    files = made(tmp_path, {"a/one": source, "a/other": "", "b/x": "", "b/__init__": ""})
    (one,) = imports(files)
    assert (one.module, one.target, one.when) == ("a.one", target, when)


def test_arrows_go_by_the_longest_layer(tmp_path: Path) -> None:
    sources = {"a/one": "import b.cli.x", "b/cli/x": "from b import low", "b/low": ""}
    sources |= {"a/two": "from b.cli import app", "b/cli/__init__": "app = 1"}
    drawn = arrows(imports(made(tmp_path, sources)), ("a", "b", "b.cli", "b.cli:app"))
    assert sorted(drawn) == ["a -> b.cli", "a -> b.cli:app", "b.cli -> b"]
    assert drawn["a -> b.cli"] == "a.one:1 imports b.cli.x"


def test_circles_are_found_however_they_are_closed(tmp_path: Path) -> None:
    files = made(
        tmp_path,
        {
            "a/one": "from a import two",
            "a/two": "from a import three",
            "a/three": "def f():\n    from a import one",
            "a/four": "from a import one",
            "b/x": "if TYPE_CHECKING:\n    from b import y",
            "b/y": "from b import x",
        },
    )
    found = imports(files)
    assert circles(found) == [["a.one", "a.three", "a.two"], ["b.x", "b.y"]]
    assert circles([one for one in found if one.when == "at import"]) == []
    excuse = {("a.three", "a.one"): "for a reason"}
    assert circles(without(found, excuse)) == [["b.x", "b.y"]]


def test_an_excuse_is_for_late_imports_alone(tmp_path: Path) -> None:
    found = imports(made(tmp_path, {"a/one": "import a.two", "a/two": "import a.one"}))
    assert circles(without(found, {("a.one", "a.two"): "none"})) == [["a.one", "a.two"]]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from b import _x", "a.one:1 imports b._x"),
        ("from b.x import _y", "a.one:1 imports b.x:_y"),
        ("import b._x", "a.one:1 imports b._x"),
        ("from b import x\nx._y()", "a.one:2 takes x._y of b.x"),
        ("import b.x\nprint(b.x._y)", "a.one:2 takes b.x._y of b.x"),
    ],
)
def test_underscore_names_of_others_are_seen(tmp_path: Path, source: str, problem: str) -> None:
    files = made(tmp_path, {"a/one": source, "b/__init__": "", "b/x": "_y = 1", "b/_x": ""})
    assert private(files) == [problem]


def test_own_underscore_names_are_ones_own(tmp_path: Path) -> None:
    source = "from a import _two\nfrom b import __version__\nfrom b import x\n_two._y, x.__doc__"
    sources = {"a/one": source, "a/_two": "_y = 1", "b/x": "", "b/__init__": ""}
    assert private(made(tmp_path, sources)) == []


def test_names_of_libraries_are_told_from_sentences(tmp_path: Path) -> None:
    files = made(
        tmp_path,
        {
            "mhc_core/one": '"""jax"""\nif x == "mlx-metal":\n    raise E("needs numpy.asarray()")',
            "mhc_core/mlx": 'x = "mlx"',
        },
    )
    assert library_names(files) == {("mhc_core.one", "mlx-metal")}
