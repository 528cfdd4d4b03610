"""Everything about this installation: what runs, what does not and why; safe to publish.

As a dict for JSON, and as lines for people. It has no path of a home folder, no user's or host's
name, and no settings but this project's and MLX's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import mhc_core
from mhc_core import discovery, machine, math
from mhc_core.backend import BackendSpec
from mhc_core.text import plain, safe

__all__ = ["overview", "sections"]


def overview(
    tokens: int = 4096, n: int = 4, channels: int = 4096, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Return the machine, its backends, plugins and settings, and the launches at these sizes."""
    sizes = {"T": tokens, "n": n, "C": channels, "dtype": dtype}
    return {
        "machine": machine.machine(),
        "devices": machine.devices(),
        "versions": machine.versions(),
        "backends": list(_backends(n, dtype)),
        "plugins": list(_plugins()),
        "environment": _environment(),
        "launches": {**sizes, **_launches(tokens, n, channels, dtype)},
    }


# ---- backends and plugins -----------------------------------------------------------------------


def _backends(n: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Describe every backend, best first: what it accepts, and why it refuses these sizes."""
    for backend in mhc_core.backends().values():
        reason = backend.reason and safe(backend.reason)
        described: dict[str, Any] = {"name": backend.name, "available": backend.available}
        described["reason"] = reason
        if backend.spec is not None:
            described |= _declared(backend.spec, n, dtype)
            needed = backend.available and backend.spec.proof is not None
            described["proofs"] = list(_proofs(backend.spec)) if needed else None
        yield described


def _declared(spec: BackendSpec, n: int, dtype: str) -> dict[str, Any]:
    return {
        "takes": list(spec.array_types),
        "dtypes": list(spec.dtypes),
        "n": list(spec.sizes),
        "by_name_only": not spec.automatic,
        "note": spec.note and safe(spec.note),
        "lacks_ops": [op for op in math.OPS if op not in spec.ops],
        "lacks_transforms": dict(spec.without),
        "refuses": spec.refuses(spec.ops[0], (dtype,), n) if spec.ops else None,
    }


def _proofs(spec: BackendSpec) -> Iterator[dict[str, Any]]:
    """Yield the verdicts of a backend's proof on this machine so far; no proof is started."""
    if spec.proof is None:
        return
    try:
        for verdict in spec.proof.verdicts():
            reason = verdict.reason and safe(verdict.reason)
            yield verdict._asdict() | {"dtypes": list(verdict.dtypes), "reason": reason}
    except Exception as error:  # of code that is not ours
        problem = safe(f"its proof raised {type(error).__name__}: {error}")
        yield {"op": "all", "dtypes": [], "n": None, "reason": problem}


def _plugins() -> Iterator[dict[str, Any]]:
    """Describe every plugin, whether it could be loaded or not."""
    for plugin, problem in discovery.plugins():
        yield {
            "name": plugin.name,
            "module": plugin.module,
            "from": plugin.distribution,
            "problem": problem and safe(problem),
        }


# ---- environment --------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """Return this project's variables and MLX's that change numbers, without folders' paths."""
    found: dict[str, str] = {}
    for name, value in sorted(os.environ.items()):
        if name.startswith("MHC_") or name == "MLX_ENABLE_TF32":
            found[name] = safe(_without_folder(value))
        elif name.startswith("MLX_"):
            found[name] = "(set)"
    return found


def _without_folder(value: str) -> str:
    _, slash, last = value.replace("\\", "/").rpartition("/")
    return f".../{last}" if slash else value


# ---- kernels ------------------------------------------------------------------------------------


def _launches(T: int, n: int, C: int, dtype: str) -> dict[str, Any]:
    """Return every kernel's launch in Metal, from the table that the kernels use."""
    from mhc_backends.kernels import KERNELS
    from mhc_backends.kernels.launch import launch
    from mhc_backends.kernels.table import TABLE, VARIABLE
    from mhc_backends.mlx_metal import SPEC

    refused = SPEC.refuses(SPEC.ops[0], (dtype,), n)
    if refused:
        return {"refused": f"the kernels' backend {refused}", "kernels": {}}
    kernels: dict[str, dict[str, Any]] = {}
    tuning = os.environ.get(VARIABLE) or VARIABLE
    for name in KERNELS:
        try:
            kernels[name] = {"takes": TABLE[name].groups, **asdict(launch(name, T, n, C, dtype))}
        except Exception as error:  # such as a tuning file that cannot be read
            problem = str(error).replace(tuning, _without_folder(tuning))
            kernels[name] = {"problem": safe(problem)}
    return {"refused": None, "kernels": kernels}


# ---- lines --------------------------------------------------------------------------------------


def sections(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return an overview as lines under titles."""
    hardware = found["machine"]
    memory = hardware["memory_gib"]
    every = {
        "machine": [
            f"{hardware['system']}, {hardware['processor']}, {hardware['cores']} cores"
            + (f", {memory} GiB" if memory else ""),
            *(f"{library}: {device}" for library, device in found["devices"].items()),
        ],
        "versions": [
            f"Python {hardware['python']}",
            *(f"{name} {version}" for name, version in found["versions"].items()),
        ],
        "backends, best first": [line for one in found["backends"] for line in _backend_lines(one)],
        "plugins": list(map(_plugin_line, found["plugins"])),
        "environment": [f"{k}={v}" for k, v in found["environment"].items()] or ["nothing set"],
        _launch_title(found["launches"]): _launch_lines(found["launches"]),
    }
    return {title: list(map(plain, lines)) for title, lines in every.items()}


def _backend_lines(backend: Mapping[str, Any]) -> Iterator[str]:
    state = "runs here" if backend["available"] else f"cannot run here: {backend['reason']}"
    yield f"{backend['name']}: {state}"
    if "takes" not in backend:
        return
    smallest, largest = backend["n"]
    facts = [", ".join(backend["takes"]), ", ".join(backend["dtypes"])]
    facts += [f"n from {smallest}" + (f" to {largest}" if largest else "")]
    facts += ["by name only"] if backend["by_name_only"] else []
    yield f"  takes {'; '.join(facts)}"
    if backend["note"]:
        yield f"  {backend['note']}"
    if backend["lacks_ops"]:
        yield f"  has no {', '.join(backend['lacks_ops'])}"
    for name, why in backend["lacks_transforms"].items():
        yield f"  no {name}: {why}"
    if backend["refuses"]:
        yield f"  does not take these sizes: it {backend['refuses']}"
    yield from _proof_lines(backend["proofs"])


def _proof_lines(proofs: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    """Yield lines that name what is proven on this machine, and what is not, with the reason."""
    if proofs is not None and not proofs:
        yield "  no proof has run here yet: an op is proven at its first call"
    proofs = proofs or ()
    held = [proof for proof in proofs if proof["reason"] is None]
    for dtype in sorted({proof["dtypes"][0] for proof in held}):
        mine = [proof for proof in held if proof["dtypes"][0] == dtype]
        ops = ", ".join(dict.fromkeys(_proven_of(proof) for proof in mine))
        yield f"  proven here, {dtype}: {ops}"
    for proof in proofs:
        if proof["reason"] is not None:
            dtype = next(iter(proof["dtypes"]), "every dtype")
            yield f"  not proven here, {dtype}: {_proven_of(proof)}: {proof['reason']}"


def _proven_of(proof: Mapping[str, Any]) -> str:
    return proof["op"] if proof["n"] is None else f"{proof['op']} n={proof['n']}"


def _plugin_line(plugin: Mapping[str, Any]) -> str:
    state = plugin["problem"] or "loaded"
    return f"{plugin['name']} = {plugin['module']} ({plugin['from']}): {state}"


def _launch_title(launches: Mapping[str, Any]) -> str:
    sizes = " ".join(f"{name}={launches[name]}" for name in ("T", "n", "C"))
    return f"kernel launches for {sizes} {launches['dtype']}"


def _launch_lines(launches: Mapping[str, Any]) -> list[str]:
    """Return the launches as aligned columns, under the field names of the launch table."""
    if launches["refused"]:
        return [f"none: {launches['refused']}"]
    kernels: Mapping[str, Mapping[str, Any]] = launches["kernels"]
    good = {name: shape for name, shape in kernels.items() if "problem" not in shape}
    problems = dict.fromkeys(str(s["problem"]) for s in kernels.values() if "problem" in s)
    words = list(next(iter(good.values()))) if good else []
    rows = [["kernel", *words]]
    rows += [[name, *map(_spell, shape.values())] for name, shape in good.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [*(lines if good else []), *problems]


def _spell(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)  # pyright: ignore
