"""The imports of a tree of packages, read from its source: what tests/test_layers.py judges."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["Import", "circles", "constants", "imports", "layer_of", "modules", "private"]


class Import(NamedTuple):
    """One import: ``name`` is what is taken out of ``target``, or "" for the module itself."""

    module: str
    target: str
    name: str
    line: int
    when: Literal["at import", "in a function", "for types"]

    def __str__(self) -> str:
        what = f"{self.target}:{self.name}" if self.name else self.target
        return f"{self.module}:{self.line} imports {what}"


def modules(packages: Mapping[str, Path]) -> dict[str, Path]:
    """Return the file of every module of the packages, by dotted name."""
    found: dict[str, Path] = {}
    for package, folder in packages.items():
        for file in sorted(folder.rglob("*.py")):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(files: Mapping[str, Path]) -> list[Import]:
    """Return every import of one of these modules by another, wherever it stands in the source."""
    found: list[Import] = []
    for module, file in files.items():
        tree = _tree(file)
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node, when in _with_time(tree):
            for target, name in _targets(node, package):
                whole = f"{target}.{name}"
                if name and whole in files:
                    target, name = whole, ""
                if target in files and target != module:
                    found.append(Import(module, target, name, node.lineno, when))
    return found


When = Literal["at import", "in a function", "for types"]


def _with_time(node: ast.AST, when: When = "at import") -> Iterator[tuple[ast.stmt, When]]:
    """Yield the statements and calls that may import, each with when it runs."""
    for child in ast.iter_child_nodes(node):
        inner = when
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner = "in a function"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            inner = "for types"
        if isinstance(child, (ast.Import, ast.ImportFrom, ast.Call)):
            yield child, when  # type: ignore[misc]
        yield from _with_time(child, inner)


def _targets(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, ""
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        ahead = parts[: len(parts) - node.level + 1] if node.level else []
        for alias in node.names:
            yield ".".join([*ahead, *([node.module] if node.module else [])]), alias.name
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value, ""


def layer_of(module: str, layers: Collection[str], name: str = "") -> str:
    """Return the layer of a module, or of a name in it: the longest that it begins with."""
    exact = f"{module}:{name}"
    if exact in layers:
        return exact
    return max((x for x in layers if f"{module}.".startswith(f"{x}.")), key=len)


def circles(found: Iterable[Import]) -> list[list[str]]:
    """Return every set of modules of one package that import each other, directly or not."""
    graph: dict[str, set[str]] = {}
    for one in found:
        if one.module.partition(".")[0] == one.target.partition(".")[0]:
            graph.setdefault(one.module, set()).add(one.target)
    reached = {module: _reached(graph, module) for module in graph}
    rings = {
        tuple(sorted({module, *(m for m in there if module in reached.get(m, ()))}))
        for module, there in reached.items()
        if module in there
    }
    return sorted(map(list, rings))


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for module in graph.get(waiting.pop(), ()):
            if module not in seen:
                seen.add(module)
                waiting.append(module)
    return seen


def _hidden(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private(files: Mapping[str, Path]) -> list[str]:
    """Return every use of an underscore name of another package: imported, or as an attribute."""
    problems: list[str] = []
    for one in imports(files):
        if one.module.partition(".")[0] == one.target.partition(".")[0]:
            continue
        if any(map(_hidden, (*one.target.split("."), one.name))):
            problems.append(str(one))
    for module, file in files.items():
        tree = _tree(file)
        problems += _private_attributes(module, tree, set(files))
    return problems


def _private_attributes(module: str, tree: ast.AST, known: Collection[str]) -> Iterator[str]:
    own = module.partition(".")[0]
    packages = {name.partition(".")[0] for name in known} - {own}
    others: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for (target, name), alias in zip(_targets(node, module), node.names, strict=True):
                if target.partition(".")[0] in packages:
                    local = alias.asname or alias.name.partition(".")[0]
                    others[local] = f"{target}.{name}" if name else target
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _hidden(node.attr):
            base: ast.AST = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in others:
                yield f"{module}:{node.lineno} takes {ast.unparse(node)} of {others[base.id]}"


def constants(file: Path) -> Iterator[tuple[int, str]]:
    """Yield every string in a source that is no docstring, with its line."""
    tree = _tree(file)
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in said:
            yield node.lineno, node.value
