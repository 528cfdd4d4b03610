"""Four ways to connect the layers of a network, on the ops of this library.

Each defines what happens before the first layer, between two layers and after the last one, so that
the fused ``combine_pre`` can be used where it applies. A state holds everything that a layer's end
needs; ``seen`` returns a state's streams and H_res.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy

import mhc_core as mhc
from mhc_core.cli.demo._settings import STREAMS
from mhc_core.variants import Variant

__all__ = ["CONNECTIONS", "Connection", "State"]

Array = Any
Numbers = dict[str, numpy.ndarray[Any, Any]]
Parameters = Mapping[str, Array]

OFF_DIAGONAL = -4.0  # of H_res's logits at first: 5 % of a stream go to the others
GATE = 0.01  # the first scale of what depends on the token, in HC and in mHC


class State(NamedTuple):
    """The streams before a layer, and its mappings."""

    x: Array  # [..., n, C]
    h_pre: Array  # [..., n]
    h_post: Array  # [..., n]
    h_res: Array  # [..., n, n]


class Connection(Protocol):
    """The interface that a model needs of a connection."""

    def __init__(self, xp: Any) -> None:
        """Store the namespace of the array library."""

    @staticmethod
    def parameters(width: int, layers: Sequence[int], rng: Any) -> Numbers:
        """Draw the parameters of the layers with these numbers, stacked."""
        ...

    def start(self, h: Array, first: Parameters) -> tuple[Any, Array]:
        """Make the streams of a hidden state; return the first layer's state and input."""
        ...

    def between(self, state: Any, y: Array, following: Parameters) -> tuple[Any, Array]:
        """Write the output of a layer; return the next layer's state and input."""
        ...

    def finish(self, state: Any, y: Array) -> Array:
        """Write the last layer's output, and collapse the streams."""
        ...

    def seen(self, state: Any) -> tuple[Array, Array]:
        """Return the streams before the layer and its H_res."""
        ...


class Residual:
    """``x' = x + F(x)``; seen as one stream with H_res = 1."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    @staticmethod
    def parameters(width: int, layers: Sequence[int], rng: Any) -> Numbers:
        """Return no parameters."""
        return {}

    def start(self, h: Array, first: Parameters) -> tuple[Array, Array]:
        """Return the hidden state as the stream and as the input."""
        return h, h

    def between(self, state: Array, y: Array, following: Parameters) -> tuple[Array, Array]:
        """Add the layer's output."""
        return state + y, state + y

    def finish(self, state: Array, y: Array) -> Array:
        """Add the layer's output."""
        return state + y

    def seen(self, state: Array) -> tuple[Array, Array]:
        """Return the state as one stream, [..., C] -> [..., 1, C], and an H_res of 1."""
        return state[..., None, :], self.xp.ones((*state.shape[:-1], 1, 1), dtype=state.dtype)


class HyperConnection:
    """Dynamic hyper-connections, as published, without constraints.

    With x~ the normed streams and s a scale: ``H_pre = s tanh(x~ W_pre) + b_pre``, ``H_post =
    s tanh(x~ W_post) + b_post``, ``H_res = (s tanh(x~ W_res) + B_res)^T``; eqs. (10-13) of
    arXiv:2409.19606, eq. (5) of arXiv:2512.24880. The columns of W are pre, post and res n.
    """

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    @staticmethod
    def parameters(width: int, layers: Sequence[int], rng: Any) -> Numbers:
        """Return the paper's start: W = 0, each layer reads one stream in turn, H_res = 1."""
        n, count = STREAMS, len(layers)
        static = numpy.zeros((count, n, n + 2), numpy.float32)
        static[:, :, 0] = numpy.eye(n)[[layer % n for layer in layers]]
        static[:, :, 1] = 1
        static[:, :, 2:] = numpy.eye(n)
        return {
            "norm": numpy.ones((count, width), numpy.float32),
            "dynamic": numpy.zeros((count, width, n + 2), numpy.float32),
            "scale": numpy.full((count, 3), GATE, numpy.float32),
            "static": static,
        }

    def start(self, h: Array, first: Parameters) -> tuple[State, Array]:
        """Set every stream to the hidden state."""
        return self._enter(mhc.expand(h, STREAMS), first)

    def between(self, state: State, y: Array, following: Parameters) -> tuple[State, Array]:
        """Run ``combine``, then the mappings of the new streams and ``aggregate``."""
        return self._enter(mhc.combine(state.x, y, state.h_post, state.h_res), following)

    def finish(self, state: State, y: Array) -> Array:
        """Sum the streams."""
        return mhc.contract(mhc.combine(state.x, y, state.h_post, state.h_res))

    def seen(self, state: State) -> tuple[Array, Array]:
        """Return the streams and H_res unchanged."""
        return state.x, state.h_res

    def _enter(self, x: Array, p: Parameters) -> tuple[State, Array]:
        xp, n = self.xp, STREAMS
        turned = xp.tanh(xp.matmul(mhc.rms_norm(x, p["norm"]), p["dynamic"]))
        groups = (p["scale"][:1], p["scale"][1:2], xp.broadcast_to(p["scale"][2:], (n,)))
        mapped = turned * xp.concat(groups, axis=0) + p["static"]
        h_res = xp.matrix_transpose(mapped[..., 2:])
        state = State(x, mapped[..., 0], mapped[..., 1], h_res)
        return state, mhc.aggregate(x, state.h_pre)


class Manifold:
    """mHC: ``pre``, then ``combine_pre`` from layer to layer."""

    variant: Variant = mhc.PAPER

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    @staticmethod
    def parameters(width: int, layers: Sequence[int], rng: Any) -> Numbers:
        """Return a start near hyper-connections': each layer mostly reads one stream in turn."""
        n, count = STREAMS, len(layers)
        pre = numpy.where(numpy.eye(n)[[layer % n for layer in layers]] == 1, 2.0, -2.0)
        res = numpy.where(numpy.eye(n) == 1, 0.0, OFF_DIAGONAL).reshape(1, n * n)
        bias = (pre, numpy.zeros((count, n)), numpy.repeat(res, count, axis=0))
        phi = rng.normal(0, 0.02, (count, n * n + 2 * n, n * width))
        return {
            "phi": phi.astype(numpy.float32),
            "scale": numpy.full((count, 3), GATE, numpy.float32),
            "bias": numpy.concatenate(bias, axis=1).astype(numpy.float32),
        }

    def start(self, h: Array, first: Parameters) -> tuple[State, Array]:
        """Set every stream to the hidden state."""
        x = mhc.expand(h, STREAMS)
        h, h_post, h_res = mhc.pre(x, first["phi"], first["scale"], first["bias"], self.variant)
        return State(x, None, h_post, h_res), h

    def between(self, state: State, y: Array, following: Parameters) -> tuple[State, Array]:
        """Run ``combine_pre``, one pass over the streams."""
        arrays = (state.x, y, state.h_post, state.h_res, *_projection(following))
        x, h, _, h_post, h_res = mhc.combine_pre(*arrays, self.variant)
        return State(x, None, h_post, h_res), h

    def finish(self, state: State, y: Array) -> Array:
        """Sum the streams."""
        return mhc.contract(mhc.combine(state.x, y, state.h_post, state.h_res))

    def seen(self, state: State) -> tuple[Array, Array]:
        """Return the streams and H_res unchanged."""
        return state.x, state.h_res


class SinglePass(Manifold):
    """DeepSeek-V4.1's order: a layer's input is mixed by the H_pre of the layer before.

    The first layer takes stream 0, and the last H_pre collapses the output.
    """

    variant: Variant = mhc.DEEPSEEK_V41

    def start(self, h: Array, first: Parameters) -> tuple[State, Array]:
        """Set every stream to the hidden state, which is the first layer's input too."""
        x = mhc.expand(h, STREAMS)
        return State(x, *mhc.mappings(x, *_projection(first), self.variant)), h

    def between(self, state: State, y: Array, following: Parameters) -> tuple[State, Array]:
        """Run ``combine_pre``, one pass over the streams, with the H_pre of the layer before."""
        arrays = (state.x, y, state.h_post, state.h_res, *_projection(following))
        x, h, *mapped = mhc.combine_pre(*arrays, self.variant, state.h_pre)
        return State(x, *mapped), h

    def finish(self, state: State, y: Array) -> Array:
        """Collapse the streams by the last H_pre."""
        x = mhc.combine(state.x, y, state.h_post, state.h_res)
        return mhc.aggregate(x, state.h_pre)


def _projection(p: Parameters) -> tuple[Array, Array, Array]:
    return p["phi"], p["scale"], p["bias"]


CONNECTIONS: Mapping[str, type[Connection]] = {
    "residual": Residual,
    "HC": HyperConnection,
    "mHC": Manifold,
    "single-pass": SinglePass,
}
