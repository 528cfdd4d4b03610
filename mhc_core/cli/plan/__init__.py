"""``mhc plan``: memory, traffic and communication of a model on several devices, by formulas."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhc_core.cli import _files
from mhc_core.planning import LAYOUTS, MODELS

if TYPE_CHECKING:
    from mhc_core.planning import Layout, Model, Plan

__all__ = ["plan"]

MEASURED = "measured"
MOST = 2**40  # tokens
MOST_DEVICES = 2**20
ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Dtype(str, Enum):
    """The dtype of the streams."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def plan(
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(MODELS)}; or a config.json, or its folder.", show_default=False
        ),
    ],
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens of a step, on all devices together.")
    ] = 4096,
    devices: Annotated[
        int, typer.Option(min=1, max=MOST_DEVICES, help="Devices that share the step.")
    ] = 8,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What they share: {', '.join(LAYOUTS)}; may be repeated, all if left out."
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="The streams' dtype.")] = Dtype.bfloat16,
    recompute: Annotated[
        int | None,
        typer.Option(min=1, help="Sublayers of a segment of recomputation; else the optimum."),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            help="GB/s of a device's memory, for the time; 'measured' measures a copy here."
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            help="GB/s that a device sends to others, for the time; 'measured' measures the "
            "all-reduce of JAX's devices here."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help=f"Write {_files.JSON_HELP}.", metavar="[FILE]")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the memory, over the segment, to this file.")
    ] = None,
) -> None:
    """Show what the hyper-connections of a model cost each device in a training step."""
    from mhc_core.cli.plan import _plot, _table

    sizes = _model(model)
    layouts = _layouts(layout)
    if plot and (reason := _plot.missing() or _files.no_picture(plot)):
        raise typer.BadParameter(reason)
    _files.check([("--json", json_file), ("--plot", plot)])
    plans: list[Plan] = []
    refused: list[str] = []
    for name in layouts:
        try:
            plans.append(_plan(sizes, tokens, devices, name, dtype.value, recompute))
        except ValueError as error:
            said = str(error).removeprefix("plan: ")
            if layout:
                raise typer.BadParameter(f"--{said}") from None
            refused.append(f"{name} is left out: {said}")
    speeds = _table.Speeds(_memory_speed(bandwidth), _link_speed(link))
    shown = _table.Shown(model, sizes, tokens, devices, dtype.value, plans, refused, speeds)
    if json_file != _files.STDOUT:
        _table.show(shown)
    written: list[bool] = []
    if json_file:
        written.append(_files.write(json_file, json.dumps(shown.record(), indent=2) + "\n"))
    if plot:

        def curve(one: Plan, segment: int) -> Plan:
            return _plan(sizes, tokens, devices, one.layout, dtype.value, segment)

        written.append(_files.write(plot, _plot.plot(plot, shown, curve)))
    if not all(written):
        raise typer.Exit(1)


def _plan(
    model: Model, tokens: int, devices: int, layout: Layout, dtype: str, segment: int | None
) -> Plan:
    from mhc_core.planning import plan as planned

    return planned(
        model,
        tokens=tokens,
        devices=devices,
        layout=layout,
        itemsize=ITEMSIZES[dtype],
        segment=segment,
    )


def _layouts(chosen: list[str] | None) -> list[Layout]:
    for word in chosen or ():
        if word not in LAYOUTS:
            raise typer.BadParameter(f"--layout is {word!r}; needs one of {', '.join(LAYOUTS)}")
    return [name for name in LAYOUTS if not chosen or name in chosen]


# ---- the model ----------------------------------------------------------------------------------


def _model(name: str) -> Model:
    """Return the sizes of a model by name, also without the maker's, or by its config.json."""
    for known, sizes in MODELS.items():
        if name in (known, known.removeprefix("deepseek-")):
            return sizes
    from mhc_backends.checkpoints.config import config_in, is_file

    path = Path(name)
    file = next((one for one in (path, path / "config.json") if is_file(one)), None)
    if file is None:
        raise typer.BadParameter(
            f"--model is {name!r}; needs a config.json or its folder, or one of {', '.join(MODELS)}"
        )
    try:
        return _of_config(config_in(file))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"--model {file}: {error}") from None


def _of_config(config: Any) -> Model:
    from mhc_backends.checkpoints.config import variant_of
    from mhc_core import checks
    from mhc_core.planning import Model
    from mhc_core.variants import PAPER

    missing = [
        key
        for key, value in (("num_hidden_layers", config.layers), ("hc_mult", config.n))
        if value is None
    ]
    if "hidden_size" not in config.fields:
        missing.append("hidden_size")
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    family = config.family
    if family is not None and family.variant is None:
        raise ValueError(f"{family.title} has gated residuals, which mhc plan does not know")
    return Model(
        layers=config.layers,
        channels=checks.positive_int("it", "hidden_size", config.fields["hidden_size"]),
        n=config.n,
        variant=PAPER if family is None else variant_of(config, family),
        single_pass=config.model_type == "deepseek_v41",
    )


# ---- speeds -------------------------------------------------------------------------------------


def _memory_speed(given: str | None) -> float | None:
    if given != MEASURED:
        return _speed("--bandwidth", given)
    import numpy

    from mhc_core.cli.bench._sides import our_side, runnable
    from mhc_core.cli.bench._timing import copy_speed

    side = our_side(runnable(None)[0])
    numbers = numpy.random.default_rng(0).random(side.library.copied_bytes // 4, numpy.float32)
    return copy_speed(side.library, side.from_host, numbers, 5) / 1e9


def _link_speed(given: str | None) -> float | None:
    if given != MEASURED:
        return _speed("--link", given)
    from mhc_core.cli.plan import _link

    reason, speed = _link.measure()
    if reason:
        raise typer.BadParameter(f"--link is {MEASURED!r}; {reason}")
    return speed


def _speed(option: str, given: str | None) -> float | None:
    """Return GB/s, or None where none are given."""
    if given is None:
        return None
    try:
        speed = float(given)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise typer.BadParameter(f"{option} is {given!r}; needs GB/s above 0, or {MEASURED!r}")
    return speed
