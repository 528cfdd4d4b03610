"""The settings that determine the numbers of a run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STREAMS", "VARIANTS", "Settings"]

STREAMS = 4

VARIANTS = {
    "residual": "x + F(x), one stream",
    "HC": "hyper-connections without constraints (arXiv:2409.19606)",
    "mHC": "H_res made doubly stochastic (arXiv:2512.24880)",
    "single-pass": "mHC as in DeepSeek-V4.1: each layer's mix comes from the layer before",
}
"""The ways to connect the layers, with a description of each."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the data and the steps; two runs of equal settings give equal numbers.

    Attributes
    ----------
    depth
        Layers, attention and MLP in turn, as the paper counts them; even.
    width, heads
        Channels C of a stream, and the heads of attention over them.
    context, batch
        Bytes of a sequence, and sequences of a step.
    steps, rate
        Steps of AdamW, and its largest learning rate.
    seed
        Of the parameters and of the order of the text.
    text
        SHA-256 of the text.
    backend
        The backend that computes; another one rounds otherwise.
    """

    depth: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    rate: float
    seed: int
    text: str
    backend: str
