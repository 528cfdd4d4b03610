"""The declaration of a mixer: how a token's logits become H_res.

A mixer is built in (``mhc_core/mixing/``) or comes from a plugin's hook ``mhc_mixers``
(:mod:`mhc_core.hookspecs`), and :class:`mhc_core.Variant` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mhc_core.checks import Check

__all__ = ["BUILTINS", "Mixer", "Option"]

BUILTINS: Mapping[str, str] = {
    "sinkhorn": "mhc_core.mixing.sinkhorn",
    "identity": "mhc_core.mixing.identity",
    "mhc-lite": "mhc_core.mixing.mhc_lite",
    "kromhc": "mhc_core.mixing.kromhc",
    "circulant": "mhc_core.mixing.circulant",
    "go-mhc": "mhc_core.mixing.go_mhc",
    "sinkhorn-limit": "mhc_core.mixing.sinkhorn_limit",
}
"""The mixers that come with mhc-core: each name, and the module with its ``MIXER``."""


class Option(NamedTuple):
    """An option of a mixer: its default, and the check of its values (:mod:`mhc_core.checks`)."""

    default: Any
    check: Check


def _any_size(n: int, **_: Any) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """The declaration of a mixer, from which shapes, checks, starts and cases are made.

    All its functions take ``n``, the number of streams, and the mixer's options by keyword.

    Attributes
    ----------
    name
        The name to write in ``Variant(mixer=...)``.
    logits
        ``logits(n, **options)``: the number L of logits of a token. phi has ``2 n + L`` rows, and
        scale has an entry for them unless L is 0.
    forward
        ``forward(logits, *, n, **options)``: H_res ``[..., n, n]`` of logits ``[..., L]``, with
        ``x'_i = sum_j H_res[i, j] x_j``. Written against the array API standard, for arrays of
        float32 or float64 of every library (:func:`mhc_core.mixing.namespace`). None where H_res
        is the identity: then no H_res is made, and :func:`mhc_core.combine` gets None.
    vjp
        ``vjp(logits, g, *, n, **options)``: the gradient of the logits from ``g``, the cotangent of
        H_res, made of operations that libraries can differentiate. None beside a forward of None.
    init
        ``init(n, **options)``: the L numbers from which the logits' bias starts.
    refuses
        ``refuses(n, **options)``: why it does not take n streams, or None.
    options
        Its options by name, numbers, words or booleans, to write in ``Variant(mixer_options=...)``.
    doubly_stochastic
        Whether the rows and the columns of every H_res sum to 1 to rounding, with no entry below 0.

    Raises
    ------
    TypeError
        For a wrong field; the message names it, what was received and what is needed.
    """

    name: str
    logits: Callable[..., int]
    forward: Callable[..., Any] | None
    vjp: Callable[..., Any] | None
    init: Callable[..., Any]
    refuses: Callable[..., str | None] = _any_size
    options: Mapping[str, Option] = field(default_factory=dict[str, Option])
    doubly_stochastic: bool = True

    def __post_init__(self) -> None:
        self._require("name", bool(self.name) and type(self.name) is str, "a word, not empty")
        for name in ("logits", "init", "refuses"):
            self._require(name, callable(getattr(self, name)), "a function")
        both = callable(self.forward) and callable(self.vjp)
        neither = self.forward is None and self.vjp is None
        self._require("forward", both or neither, "a function beside a vjp, or None beside None")
        options: Any = self.options
        good = isinstance(options, Mapping)
        pairs: list[tuple[Any, Any]] = list(options.items()) if good else []
        good = good and all(
            type(name) is str and isinstance(one, Option) and callable(one.check)
            for name, one in pairs
        )
        self._require("options", good, "a mapping of names to mhc_core.mixer.Option")
        good = type(self.doubly_stochastic) is bool
        self._require("doubly_stochastic", good, "True or False")

    def _require(self, name: str, good: bool, need: str) -> None:
        if not good:
            raise TypeError(f"Mixer: {name} is {getattr(self, name)!r}; needs {need}")

    def __hash__(self) -> int:
        return hash(self.name)
