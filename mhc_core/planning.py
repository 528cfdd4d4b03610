"""The cost of hyper-connections at scale: memory, traffic and communication, by formulas.

The symbols are T (tokens), L (sublayers: two a layer), n (streams), C (channels), m (rows of phi),
s (bytes of a number of the streams, 2 or 4) and D (devices). Mappings, parameters and their
gradients are float32, as the ops compute them. T, L and C are those of one device:

========  ============  =====  ==============
layout    T             L      C
========  ============  =====  ==============
data      tokens / D    all    all
sequence  tokens / D    all    all
channels  tokens        all    channels / D
pipeline  tokens        L / D  all
========  ============  =====  ==============

Only the hyper-connections are counted: not the layers between them, nor an optimizer's state.
The pass before the first sublayer and the collapse after the last, 2 n C numbers a token, are
counted as one more pass of ``combine_pre``.

Examples
--------
>>> from mhc_core.planning import MODELS, plan
>>> one = plan(MODELS["deepseek-v4-flash"], tokens=4096, devices=8, layout="channels")
>>> [(step.name, step.kind, step.count) for step in one.communication][0]
('u and sum of squares, forward', 'all-reduce', 86)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mhc_core import checks
from mhc_core.variants import DEEPSEEK_V4, DEEPSEEK_V41, GLM53_FLASH, HY_V4, Variant

__all__ = ["LAYOUTS", "MODELS", "Layout", "Model", "Plan", "Quantity", "Transfer", "plan"]

FLOAT = 4  # bytes of a mapping, of a parameter and of a gradient of one
SUBLAYERS = 2  # of a layer: attention and MLP

Layout = Literal["data", "sequence", "channels", "pipeline"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
"""The ways in which devices share a step."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a model that concern its hyper-connections.

    Parameters
    ----------
    layers, channels, n
        Its layers, of two sublayers each; the channels and the number of its streams.
    variant
        What its mappings are made by.
    single_pass
        Whether a layer's input is mixed by the H_pre of the sublayer before, as in DeepSeek-V4.1.

    Raises
    ------
    TypeError, ValueError
        For a wrong field; the message names it, what was received and what is needed.
    """

    layers: int
    channels: int
    n: int = 4
    variant: Variant = DEEPSEEK_V4
    single_pass: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "channels", "n"):
            checks.positive_int("Model", name, getattr(self, name))
        checks.boolean("Model", "single_pass", self.single_pass)

    @property
    def columns(self) -> int:
        """Return m, the rows of phi."""
        return self.variant.columns(self.n)

    @property
    def mapped(self) -> int:
        """Return the numbers of a token's H_pre, H_post and H_res."""
        return 2 * self.n + (self.n**2 if self.variant.mixes else 0)


MODELS: Mapping[str, Model] = {
    "deepseek-v4-flash": Model(layers=43, channels=4096),
    "deepseek-v4-pro": Model(layers=61, channels=7168),
    "deepseek-v4.1-flash": Model(layers=40, channels=5120, variant=DEEPSEEK_V41, single_pass=True),
    "glm-5.3-flash": Model(layers=45, channels=4096, variant=GLM53_FLASH),
    "hy-v4": Model(layers=78, channels=6144, variant=HY_V4),
}
"""Released models by name."""


class Quantity(NamedTuple):
    """A number of bytes, and the formula that it comes from."""

    name: str
    size: int
    formula: str


@dataclass(frozen=True)
class Transfer:
    """Data that devices exchange in a step.

    ``size`` bytes are summed or sent ``count`` times; ``sent`` is what one device sends in all. A
    ring all-reduce over D devices sends 2 (D - 1) / D of what it sums from each device.
    """

    name: str
    kind: Literal["all-reduce", "send"]
    count: int
    size: int
    sent: int
    formula: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a training step on one device, the fullest where they differ.

    Attributes
    ----------
    tokens, sublayers, channels
        T, L and C of the device.
    parameters
        phi, scale and bias, and as much again for their gradients.
    kept
        What the vjps keep of the forward, without recomputation.
    segment
        The size of a segment of recomputation, in sublayers.
    recomputed
        What is kept with recomputation in such segments: at most, during the backward pass.
    optimum
        The segment for which that is least.
    traffic
        The least that memory must move: every input of an op once, and every output once.
    communication
        What the device exchanges with others.
    """

    layout: Layout
    tokens: int
    sublayers: int
    channels: int
    parameters: tuple[Quantity, ...]
    kept: tuple[Quantity, ...]
    segment: int
    recomputed: tuple[Quantity, ...]
    optimum: int
    traffic: tuple[Quantity, ...]
    communication: tuple[Transfer, ...]

    @property
    def moved(self) -> int:
        """Return the bytes that memory must move in a step."""
        return total(self.traffic)

    @property
    def sent(self) -> int:
        """Return the bytes that the device sends in a step."""
        return sum(one.sent for one in self.communication)


def total(quantities: Sequence[Quantity]) -> int:
    """Return the sum of quantities, in bytes."""
    return sum(one.size for one in quantities)


def plan(
    model: Model,
    *,
    tokens: int,
    devices: int = 1,
    layout: Layout = "data",
    itemsize: int = 2,
    segment: int | None = None,
) -> Plan:
    """Return what a training step costs one of ``devices``.

    Parameters
    ----------
    model
        The model's sizes, of :data:`MODELS` or others.
    tokens
        The tokens of a step, on all devices together; with ``"pipeline"``, those in flight.
    devices, layout
        How many devices share the step, and by what they share it: :data:`LAYOUTS`.
    itemsize
        The bytes of a number of the streams.
    segment
        The sublayers of a segment of recomputation; the optimum if None. Communication and traffic
        count no recomputation.

    Raises
    ------
    TypeError, ValueError
        For a wrong argument; the message names it, what was received and what is needed.
    """
    for name, value in (("tokens", tokens), ("devices", devices), ("itemsize", itemsize)):
        checks.positive_int("plan", name, value)
    checks.one_of(*LAYOUTS)("plan", "layout", layout)
    part = _part(model, tokens, devices, layout, itemsize)
    optimum = min(range(1, part.L + 1), key=lambda size: total(part.recomputed(size)))
    if segment is not None:
        checks.positive_int("plan", "segment", segment)
    size = min(segment or optimum, part.L)
    return Plan(
        layout=layout,
        tokens=part.T,
        sublayers=part.L,
        channels=part.C,
        parameters=part.parameters(),
        kept=part.kept(),
        segment=size,
        recomputed=part.recomputed(size),
        optimum=optimum,
        traffic=part.traffic(),
        communication=part.communication(layout, devices),
    )


def _part(model: Model, tokens: int, devices: int, layout: Layout, itemsize: int) -> _Part:
    """Return the part of one device, the largest."""
    channels, layers = model.channels, model.layers
    if layout == "channels":
        if channels % devices:
            raise ValueError(
                f"plan: devices is {devices}; needs a divisor of C={channels} for channels"
            )
        channels //= devices
    elif layout == "pipeline":
        if devices > layers:
            raise ValueError(f"plan: devices is {devices}; needs at most {layers}, the layers")
        layers = _up(layers, devices)
    else:
        tokens = _up(tokens, devices)
    return _Part(model, tokens, SUBLAYERS * layers, channels, itemsize)


def _up(count: int, parts: int) -> int:
    return -(-count // parts)


class _Part(NamedTuple):
    """The part of one device, by the letters of the formulas."""

    model: Model
    T: int
    L: int
    C: int
    s: int

    @property
    def _rows(self) -> int:
        """Return the numbers of a connection's scale and bias."""
        return self.model.variant.parts(self.model.n) + self.model.columns

    @property
    def _phi(self) -> int:
        return self.model.columns * self.model.n * self.C

    def _streams(self, count: int, width: int, extra: int = 0) -> int:
        return count * self.T * (width * self.model.n + extra) * self.C * self.s

    def parameters(self) -> tuple[Quantity, ...]:
        size = FLOAT * self.L * (self._phi + self._rows)
        formula = f"4 L (m n C + m + {self._rows - self.model.columns})"
        return (
            Quantity("phi, scale, bias", size, formula),
            Quantity("their gradients", size, formula),
        )

    def kept(self) -> tuple[Quantity, ...]:
        return (
            Quantity("streams, h, y", self._streams(self.L, 1, 2), "L T (n + 2) C s"),
            self._mappings("mappings", self.L, "L"),
        )

    def _mappings(self, name: str, count: int, letter: str) -> Quantity:
        """Return H_pre, H_post, H_res, and u and r, from which they are made."""
        each = self.model.mapped + self.model.columns + 1
        return Quantity(name, FLOAT * count * self.T * each, f"4 {letter} T {self._mapped(1)}")

    def _mapped(self, more: int) -> str:
        """Return the formula of m + mapped + more; m and mapped are the same for most mixers."""
        model = self.model
        if model.mapped == model.columns:
            return f"(2 m + {more})"
        return f"(m + {model.mapped} + {more})"

    def recomputed(self, segment: int) -> tuple[Quantity, ...]:
        segments, n = _up(self.L, segment), self.model.n
        # H_post and H_res of the sublayer that is open there, and the H_pre for the next input
        open_ones = self.model.mapped - (0 if self.model.single_pass else n)
        edges = self._streams(segments, 1, 1) + FLOAT * segments * self.T * open_ones
        formula = f"ceil(L / R) T ((n + 1) C s + 4 x {open_ones})"
        return (
            Quantity("at the edges of segments", edges, formula),
            Quantity("in a segment", self._streams(segment, 1, 2), "R T (n + 2) C s"),
            self._mappings("its mappings", segment, "R"),
        )

    def traffic(self) -> tuple[Quantity, ...]:
        """Return the traffic of a forward and of a backward pass.

        The mappings: a combine_pre reads H_post and H_res and writes the next H_pre, H_post and
        H_res; its vjp reads the first two and the cotangents of all five, and writes those of the
        first two. V4.1's order reads H_pre too, and its vjp writes its cotangent.
        """
        n, mapped, m = self.model.n, self.model.mapped, "m"
        more = n if self.model.single_pass else 0
        forward, backward = 2 * mapped - n + more, 3 * mapped - 2 * n + 2 * more
        if mapped != self.model.columns:
            m = str(mapped)
        per_token = FLOAT * self.L * self.T
        weights = FLOAT * self.L * (self._phi + self._rows)
        one = f"4 L (m n C + m + {self._rows - self.model.columns})"
        less, twice = ("", "") if more else (" - n", " - 2 n")
        return (
            Quantity("forward: streams, h, y", self._streams(self.L, 2, 2), "L T (2 n + 2) C s"),
            Quantity("forward: mappings", per_token * forward, f"4 L T (2 {m}{less})"),
            Quantity("forward: parameters", weights, one),
            Quantity("backward: streams, h, y", self._streams(self.L, 3, 3), "L T (3 n + 3) C s"),
            Quantity("backward: mappings", per_token * backward, f"4 L T (3 {m}{twice})"),
            Quantity("backward: parameters", 2 * weights, f"2 x {one}"),
        )

    def communication(self, layout: Layout, devices: int) -> tuple[Transfer, ...]:
        if devices == 1:
            return ()
        if layout == "channels":
            return self._by_channels(devices)
        if layout == "pipeline":
            return self._by_stages(devices)
        gradients = self.parameters()[1]
        return (_reduced("gradients of phi, scale, bias", self.L, gradients, devices),)

    def _by_channels(self, devices: int) -> tuple[Transfer, ...]:
        """Return the sums over channels: of phi's products, and in the dots of the vjps."""
        model = self.model
        token = FLOAT * self.L * self.T
        last = "m" if model.mapped == model.columns else str(model.mapped)
        forward = Quantity(
            "u and sum of squares, forward", token * (model.columns + 1), "4 L T (m + 1)"
        )
        backward = Quantity(
            "dH_pre, dH_post, dH_res, backward", token * model.mapped, f"4 L T {last}"
        )
        return tuple(_reduced(q.name, self.L, q, devices) for q in (forward, backward))

    def _by_stages(self, devices: int) -> tuple[Transfer, ...]:
        """Return what a stage sends: the streams onward and their cotangent back.

        A stage between two others sends both; with two stages each sends one.
        """
        mix = FLOAT * self.T * self.model.n if self.model.single_pass else 0
        size = self._streams(1, 1) + mix
        formula = "T n C s" + (" + 4 T n" if mix else "")
        what = "streams and H_pre" if mix else "streams"
        count = min(devices - 1, 2)
        steps = (f"{what}, forward", f"cotangents of {what}, backward")
        if count == 1:
            steps = (f"{what}, or their cotangents",)
        return tuple(Transfer(name, "send", 1, size, size, formula) for name in steps)


def _reduced(name: str, count: int, summed: Quantity, devices: int) -> Transfer:
    sent = math.ceil(2 * (devices - 1) * summed.size / devices)
    each = summed.size // count
    formula = f"2 (D - 1) / D x {summed.formula}"
    return Transfer(name, "all-reduce", count, each, sent, formula)
