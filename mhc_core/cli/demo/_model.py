"""A byte-level transformer, whose layers are connected in one of four ways.

It is written once, against the array API and the ops of this library, and runs on JAX and MLX.
Parameters are drawn by NumPy, so that both start from the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy

import mhc_core as mhc
from mhc_core.cli.demo._connections import CONNECTIONS, Connection
from mhc_core.cli.demo._settings import Settings

__all__ = ["Kept", "Model", "initial"]

Array = Any
Parameters = Mapping[str, Array]
Loop = Callable[[Callable[[Any, Any], Any], Any, Parameters], tuple[Any, Any]]

BYTES = 256
LAYERS = ("attention", "mlp")  # of a block


class Kept(NamedTuple):
    """The values inspected in a model: the streams and the H_res of every layer."""

    streams: Array  # [depth, batch, context, n, C]
    h_res: Array  # [depth, batch, context, n, n]


def initial(settings: Settings, variant: str) -> dict[str, numpy.ndarray[Any, Any]]:
    """Draw the parameters; the arrays of the blocks are stacked.

    The transformer's parameters are the same for every variant.
    """
    s, rng = settings, numpy.random.default_rng(settings.seed)
    blocks, C = s.depth // 2, s.width

    def normal(*shape: int, spread: float) -> numpy.ndarray[Any, Any]:
        return rng.normal(0, spread, shape).astype(numpy.float32)

    def ones(*shape: int) -> numpy.ndarray[Any, Any]:
        return numpy.ones(shape, numpy.float32)

    narrow = 1 / math.sqrt(C)
    deep = 1 / math.sqrt(s.depth)  # the sum of all layers is then as large as one
    drawn = {
        "bytes": normal(BYTES, C, spread=1),
        "positions": normal(s.context, C, spread=0.5),
        "attention.norm": ones(blocks, C),
        "attention.in": normal(blocks, C, 3 * C, spread=narrow),
        "attention.out": normal(blocks, C, C, spread=narrow * deep),
        "mlp.norm": ones(blocks, C),
        "mlp.in": normal(blocks, C, 4 * C, spread=narrow),
        "mlp.out": normal(blocks, 4 * C, C, spread=narrow / 2 * deep),
        "norm": ones(C),
        "logits": normal(C, BYTES, spread=narrow),
    }
    for k, layer in enumerate(LAYERS):
        own = CONNECTIONS[variant].parameters(C, range(k, s.depth, 2), rng)
        drawn |= {f"{layer}.connection.{name}": array for name, array in own.items()}
    return drawn


class Model:
    """The transformer as functions of its parameters.

    Attributes
    ----------
    settings, connection
        Its sizes, and how its layers are connected.
    xp
        The namespace of the array library.
    loop
        Applies a body to a carry and every entry of stacked arrays, as ``jax.lax.scan`` does.
    """

    def __init__(self, settings: Settings, variant: str, xp: Any, loop: Loop) -> None:
        self.settings = settings
        self.connection: Connection = CONNECTIONS[variant](xp)
        self.xp = xp
        self.loop = loop

    def loss(self, parameters: Parameters, tokens: Array) -> Array:
        """Return the cross entropy of the next byte, in nats; tokens ``[batch, context + 1]``."""
        xp = self.xp
        h, _ = self._hidden(parameters, tokens[:, :-1], look=False)
        logits = xp.matmul(mhc.rms_norm(h, parameters["norm"]), parameters["logits"])
        largest = xp.max(logits, axis=-1, keepdims=True)
        normaliser = xp.log(xp.sum(xp.exp(logits - largest), axis=-1)) + largest[..., 0]
        own = xp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return xp.mean(normaliser - own)

    def look(self, parameters: Parameters, tokens: Array) -> Kept:
        """Return every layer's streams and H_res."""
        return self._hidden(parameters, tokens[:, :-1], look=True)[1]

    # ---- the blocks -----------------------------------------------------------------------------

    def _hidden(self, parameters: Parameters, tokens: Array, look: bool) -> tuple[Array, Any]:
        """Run all blocks: a loop, then the last one alone, since no layer follows it."""
        xp, connection = self.xp, self.connection
        blocks = {name: array for name, array in parameters.items() if name.startswith(LAYERS)}
        first = {name: array[0] for name, array in _mapping(blocks, "attention").items()}
        last = {name: array[-1] for name, array in blocks.items()}

        def block(carry: Any, own: Parameters) -> tuple[Any, Any]:
            state, y, kept = self._block(carry, own, look)
            return connection.between(state, y, _mapping(own, "next")), kept

        h = xp.take(parameters["bytes"], tokens, axis=0) + parameters["positions"]
        carry = connection.start(h, first)
        kept: list[Any] = []
        if self.settings.depth > len(LAYERS):
            others = {name: array[:-1] for name, array in blocks.items()}
            for name, array in _mapping(blocks, "attention").items():
                others[f"next.connection.{name}"] = array[1:]
            carry, many = self.loop(block, carry, others)
            kept.append(many)
        state, y, one = self._block(carry, last, look)
        kept.append(one)
        return connection.finish(state, y), self._joined(kept) if look else None

    def _block(self, carry: Any, own: Parameters, look: bool) -> tuple[Any, Array, Kept | None]:
        """Return the state of the block's last layer, that layer's output, and what is seen."""
        xp, connection = self.xp, self.connection
        state, h = carry
        seen = [connection.seen(state)]
        state, h = connection.between(state, self._attention(h, own), _mapping(own, "mlp"))
        seen.append(connection.seen(state))
        kept = Kept(*(xp.stack(two) for two in zip(*seen, strict=True))) if look else None
        return state, self._mlp(h, own), kept

    def _joined(self, kept: list[Any]) -> Kept:
        """[blocks, 2, ...] and [2, ...] -> [depth, ...]."""
        one = kept[-1]
        flat = [
            [self.xp.reshape(part, (-1, *last.shape[1:])) for part in parts]
            for parts, last in zip(zip(*kept, strict=True), one, strict=True)
        ]
        return Kept(*(self.xp.concat(parts, axis=0) for parts in flat))

    # ---- the layers -----------------------------------------------------------------------------

    def _attention(self, h: Array, own: Parameters) -> Array:
        xp, s = self.xp, self.settings
        batch, length, C = h.shape
        size = C // s.heads
        mixed = xp.matmul(mhc.rms_norm(h, own["attention.norm"]), own["attention.in"])
        split = xp.reshape(mixed, (batch, length, 3, s.heads, size))
        q, k, v = (xp.permute_dims(split[:, :, i], (0, 2, 1, 3)) for i in range(3))
        scores = xp.matmul(q, xp.matrix_transpose(k)) / math.sqrt(size)
        past = xp.tril(xp.ones((length, length), dtype=xp.float32))
        scores = xp.where(past == 1, scores, -1e9)
        powers = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        values = xp.matmul(powers / xp.sum(powers, axis=-1, keepdims=True), v)
        joined = xp.reshape(xp.permute_dims(values, (0, 2, 1, 3)), (batch, length, C))
        return xp.matmul(joined, own["attention.out"])

    def _mlp(self, h: Array, own: Parameters) -> Array:
        xp = self.xp
        inner = xp.matmul(mhc.rms_norm(h, own["mlp.norm"]), own["mlp.in"])
        return xp.matmul(xp.square(xp.maximum(inner, 0.0)), own["mlp.out"])


def _mapping(parameters: Parameters, layer: str) -> dict[str, Array]:
    """Return the connection's parameters of one kind of layer."""
    prefix = f"{layer}.connection."
    return {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
