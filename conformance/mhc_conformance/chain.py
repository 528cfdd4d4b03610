"""One real model on every backend: bytes of Python's own sources through four mHC sublayers.

embedding -> expand -> 4 x (pre, F, combine) -> head -> next-byte loss, with F a small MLP. It is
written once against the array API and the public ops; its gradients are composed of
``mhc_core.vjp`` by hand and, where the library has it, taken by the library's own grad too. The
reference is the same chain on the NumPy backend in float64.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mhc_core as mhc
from mhc_conformance.subject import Subject

__all__ = ["Chain", "Outcome", "compare", "run_chain", "text"]

Array = NDArray[Any]
Values = dict[str, Any]

TOLERANCE = 2e-5  # of float32 runs, relative to each array's largest entry; measured 3e-6
OPS = ("expand", "pre", "combine", "head")  # that a backend needs to run it
BYTES, CHANNELS, HIDDEN, STREAMS, SUBLAYERS, TOKENS = 256, 32, 64, 4, 4, 256


def text(length: int = TOKENS + 1) -> Array:
    """Return bytes of the standard library's argparse module, from its first function on."""
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    start = source.index(b"def ")
    return np.frombuffer(source[start : start + length], np.uint8).astype(np.int32)


@dataclass(frozen=True)
class Chain:
    """A model's parameters, drawn from a seed, and the bytes that it reads."""

    parameters: Mapping[str, Array]
    data: Array
    variant: mhc.Variant = mhc.DEEPSEEK_V4

    @classmethod
    def make(cls, seed: int = 0) -> Chain:
        """Draw a model."""
        rng = np.random.default_rng(seed)
        n, C, m = STREAMS, CHANNELS, STREAMS * (STREAMS + 2)
        shapes: dict[str, tuple[tuple[int, ...], float]] = {"embedding": ((BYTES, C), 1.0)}
        for i in range(SUBLAYERS):
            shapes |= {
                f"phi{i}": ((m, n * C), (n * C) ** -0.5),
                f"scale{i}": ((3,), 0.5),
                f"bias{i}": ((m,), 1.0),
                f"up{i}": ((C, HIDDEN), C**-0.5),
                f"down{i}": ((HIDDEN, C), HIDDEN**-0.5),
            }
        shapes |= {
            "head_phi": ((n, n * C), (n * C) ** -0.5),
            "head_scale": ((1,), 0.5),
            "head_bias": ((n,), 1.0),
            "output": ((C, BYTES), C**-0.5),
        }
        drawn = {name: rng.normal(0, size, shape) for name, (shape, size) in shapes.items()}
        return cls({name: value.astype(np.float32) for name, value in drawn.items()}, text())


@dataclass(frozen=True)
class Outcome:
    """One backend's results on the chain, as NumPy arrays."""

    backend: str
    loss: float
    hidden: Array  # of every token, before the output matrix
    gradients: Mapping[str, Array]
    native: Mapping[str, Array] | None  # by the library's own grad


class _Run:
    """The chain on one backend."""

    def __init__(self, subject: Subject, chain: Chain, dtype: str) -> None:
        from array_api_compat import array_namespace

        self.subject, self.chain, self.name = subject, chain, subject.name
        names = list(chain.parameters)
        own = subject.take([chain.parameters[name].astype(dtype) for name in names])
        self.values: Values = dict(zip(names, own, strict=True))
        self.xp: Any = array_namespace(own[0])
        one_hot = np.eye(BYTES, dtype=dtype)[chain.data]
        self.inputs, self.targets = subject.take([one_hot[:-1], one_hot[1:]])

    def forward(self, p: Values) -> tuple[Any, list[Values], Any, Any]:
        """Return the loss, each sublayer's values, the last streams and the hidden states."""
        variant, name = self.chain.variant, self.name
        x = mhc.expand(self.product(self.inputs, p["embedding"]), STREAMS, backend=name)
        kept: list[Values] = []
        for i in range(SUBLAYERS):
            phi, scale, bias = p[f"phi{i}"], p[f"scale{i}"], p[f"bias{i}"]
            h, h_post, h_res = mhc.pre(x, phi, scale, bias, variant, backend=name)
            inner = self.xp.tanh(self.product(h, p[f"up{i}"]))
            y = self.product(inner, p[f"down{i}"])
            kept.append({"x": x, "h": h, "h_post": h_post, "h_res": h_res, "inner": inner, "y": y})
            x = mhc.combine(x, y, h_post, h_res, backend=name)
        head = (p["head_phi"], p["head_scale"], p["head_bias"])
        hidden = mhc.head(x, *head, variant, backend=name)
        return self.loss(self.product(hidden, p["output"])), kept, x, hidden

    def product(self, a: Any, b: Any) -> Any:
        """Multiply matrices as a sum of products, in full float32.

        F is not under test, and the matmul of JAX or MLX may by default use TF32 on a GPU, with 10
        bits.
        """
        return self.xp.sum(a[:, :, None] * b[None, :, :], axis=1)

    def loss(self, logits: Any) -> Any:
        """Return the mean cross entropy of the next byte."""
        shifted = logits - self.xp.max(logits, axis=-1, keepdims=True)
        log_sum = self.xp.log(self.xp.sum(self.xp.exp(shifted), axis=-1))
        return self.xp.mean(log_sum - self.xp.sum(shifted * self.targets, axis=-1))

    def backward(self, p: Values, kept: Sequence[Values], x: Any, hidden: Any) -> Values:
        """Compose the gradients of all parameters by mhc_core.vjp and the chain rule."""
        variant, name, xp = {"variant": self.chain.variant}, self.name, self.xp
        logits = self.product(hidden, p["output"])
        powers = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        softmax = powers / xp.sum(powers, axis=-1, keepdims=True)
        d_logits = (softmax - self.targets) / (len(self.chain.data) - 1)
        d: Values = {"output": self.product(_t(xp, hidden), d_logits)}
        head = (x, p["head_phi"], p["head_scale"], p["head_bias"])
        d_hidden = self.product(d_logits, _t(xp, p["output"]))
        g, *d_head = mhc.vjp("head", head, d_hidden, **variant, backend=name)
        d |= dict(zip(("head_phi", "head_scale", "head_bias"), d_head, strict=True))
        for i in reversed(range(SUBLAYERS)):
            k, up, down = kept[i], p[f"up{i}"], p[f"down{i}"]
            combined = (k["x"], k["y"], k["h_post"], k["h_res"])
            dx, dy, *d_mapped = mhc.vjp("combine", combined, g, backend=name)
            d_inner = self.product(dy, _t(xp, down)) * (1 - k["inner"] ** 2)
            d[f"down{i}"] = self.product(_t(xp, k["inner"]), dy)
            d[f"up{i}"] = self.product(_t(xp, k["h"]), d_inner)
            before = (k["x"], p[f"phi{i}"], p[f"scale{i}"], p[f"bias{i}"])
            cotangents = (self.product(d_inner, _t(xp, up)), *d_mapped)
            more, *d_own = mhc.vjp("pre", before, cotangents, **variant, backend=name)
            d |= dict(zip((f"phi{i}", f"scale{i}", f"bias{i}"), d_own, strict=True))
            g = dx + more
        embedded = self.product(self.inputs, p["embedding"])
        (d_embedded,) = mhc.vjp("expand", (embedded,), g, n=STREAMS, backend=name)
        return {**d, "embedding": self.product(_t(xp, self.inputs), d_embedded)}

    def native(self) -> Values | None:
        """Take all gradients by the library's own grad, where it has one."""
        if self.subject.lacks("grad"):
            return None
        names = list(self.values)

        def loss(*values: Any) -> Any:
            return self.forward(dict(zip(names, values, strict=True)))[0]

        gradients = self.subject.transform("grad")(loss, range(len(names)))
        return dict(zip(names, gradients(*self.values.values()), strict=True))

    def outcome(self) -> Outcome:
        """Run the chain: forward, composed gradients and the library's own."""
        loss, kept, x, hidden = self.forward(self.values)
        gradients = self.backward(self.values, kept, x, hidden)
        native = self.native()
        return Outcome(
            self.name,
            float(loss),
            self._host(hidden),
            {name: self._host(gradients[name]) for name in self.values},
            native and {name: self._host(native[name]) for name in self.values},
        )

    def _host(self, array: Any) -> Array:
        return self.subject.give(array)[0].astype(np.float64)


def _t(xp: Any, matrix: Any) -> Any:
    return xp.matrix_transpose(matrix)


def run_chain(name: str, chain: Chain, dtype: str = "float32") -> Outcome:
    """Run the chain, forward and gradients, on one backend."""
    subject = Subject(name)
    with subject.dtype_context(dtype):
        return _Run(subject, chain, dtype).outcome()


def compare(one: Outcome, other: Outcome) -> tuple[float, float]:
    """Return how far two outcomes are apart: the hidden states, and the worst of all gradients.

    Each array's difference is taken relative to its largest entry in ``other``.
    """
    sets = [one.gradients] if one.native is None else [one.gradients, one.native]
    worst = max(
        _apart(gradients[name], other.gradients[name])
        for gradients in sets
        for name in other.gradients
    )
    return _apart(one.hidden, other.hidden), worst


def _apart(one: Array, other: Array) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())
