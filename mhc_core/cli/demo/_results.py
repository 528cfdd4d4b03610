"""The numbers of a report, computed from the trained models."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy

import mhc_core as mhc
from mhc_core import diagnostics, machine
from mhc_core.cli.demo._connections import CONNECTIONS, Manifold
from mhc_core.cli.demo._model import LAYERS
from mhc_core.cli.demo._settings import VARIANTS, Settings
from mhc_core.cli.demo._train import Trained

__all__ = ["ITERATIONS", "Column", "results", "smooth"]

ITERATIONS = range(1, 31)  # of Sinkhorn, for the curve of its error
LAST = 0.05  # of the steps: the loss that is shown is their mean

Numbers = Any
Column = list[float | None]  # None for NaN and infinity, which JSON lacks


def results(
    settings: Settings,
    text_name: str,
    command: str,
    trained: Mapping[str, Trained],
) -> dict[str, Any]:
    """Return all that a report shows, as plain lists and numbers."""
    library = mhc.backends()[settings.backend].spec
    names = (library.array_types[0].partition(".")[0],) if library else ()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "text": text_name,
        "machine": machine.machine(),
        "devices": machine.devices(names),
        "versions": machine.versions(),
        "variants": {name: _variant(name, one) for name, one in trained.items()},
    }


def _variant(name: str, trained: Trained) -> dict[str, Any]:
    history, kept = trained.history, trained.kept
    seconds = history["seconds"].tolist()
    return {
        "what": VARIANTS[name],
        "parameters": sum(array.size for array in trained.parameters.values()),
        "loss": _rounded(history["loss"]),
        "norm": _rounded(history["norm"]),
        "final_loss": smooth(_rounded(history["loss"]))[-1],
        "looked": history["looked"].tolist(),
        "looked_forward": _rounded(history["gain_forward"]),
        "looked_backward": _rounded(history["gain_backward"]),
        **_depth(kept.streams, kept.h_res),
        "sinkhorn": _sinkhorn(name, trained),
        "seconds": _number(statistics.median(seconds)),
        "memory": int(history["memory"][-1]) or None,
    }


def smooth(numbers: Column) -> Column:
    """Return the mean of each number and those before it, over a window of a twentieth of all."""
    window = max(1, round(LAST * len(numbers)))
    means: Column = []
    for k, last in enumerate(numbers):
        near = [number for number in numbers[max(0, k + 1 - window) : k + 1] if number is not None]
        means.append(None if last is None else _number(sum(near) / len(near)))
    return means


def _depth(streams: Numbers, h_res: Numbers) -> dict[str, Any]:
    """Return the numbers that change from layer to layer, as means over the sequence's tokens."""
    products = diagnostics.composite(h_res)
    layer = diagnostics.gain(h_res)
    whole = diagnostics.composite_gain(h_res)
    errors = diagnostics.sum_errors(h_res)
    told = {
        "layer_forward": layer[0],
        "layer_backward": layer[1],
        "gain_forward": whole[0],
        "gain_backward": whole[1],
        "row_error": errors[0],
        "column_error": errors[1],
        "entropy": diagnostics.entropy(h_res),
        "similarity": diagnostics.stream_similarity(streams),
    }
    means = {name: _rounded(_over_tokens(numbers)) for name, numbers in told.items()}
    pictures = {"h_res": h_res, "products": products}
    return means | {name: _flat(_over_tokens(numbers)) for name, numbers in pictures.items()}


def _over_tokens(numbers: Numbers) -> Numbers:
    """[depth, batch, context, ...] -> [depth, ...]."""
    return numbers.mean(axis=(1, 2), dtype=numpy.float64)


def _flat(matrices: Numbers) -> list[Column]:
    return [[_number(entry, digits=3) for entry in matrix.ravel()] for matrix in matrices]


def _sinkhorn(name: str, trained: Trained) -> dict[str, Column] | None:
    """Return the worst error of any layer and token after 1, 2, ... iterations."""
    connection = CONNECTIONS[name]
    if not issubclass(connection, Manifold):
        return None
    worst: dict[str, Column] = {"rows": [], "columns": []}
    for iterations in ITERATIONS:
        variant = replace(connection.variant, sinkhorn_iterations=iterations)
        errors = [diagnostics.sum_errors(h_res) for h_res in _mapped(trained, variant)]
        for key, column in zip(worst, zip(*errors, strict=True), strict=True):
            worst[key].append(_number(max(error.max() for error in column)))
    return worst


def _mapped(trained: Trained, variant: mhc.Variant) -> Sequence[Numbers]:
    """Return H_res of every layer's streams, computed anew with the given variant."""
    found: list[Numbers] = []
    for layer, x in enumerate(trained.kept.streams):
        kind, block = LAYERS[layer % len(LAYERS)], layer // len(LAYERS)
        phi, scale, bias = (
            trained.parameters[f"{kind}.connection.{name}"][block]
            for name in ("phi", "scale", "bias")
        )
        found.append(mhc.mappings(x, phi, scale, bias, variant, backend="numpy")[2])
    return found


def _rounded(numbers: Numbers) -> Column:
    """Round to five digits: people read the report."""
    return [_number(number) for number in numbers]


def _number(number: Any, digits: int = 5) -> float | None:
    return float(f"{float(number):.{digits}g}") if numpy.isfinite(number) else None
