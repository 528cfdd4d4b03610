"""Whether gradients are wanted of what is computed: inference may do without what they need."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["no_grad", "wanted"]

_wanted: ContextVar[bool] = ContextVar("mhc_gradients_wanted", default=True)


@contextmanager
def no_grad() -> Generator[None]:
    """Say that no gradient will be taken of the ops that are called inside.

    The results are the same, bit for bit. Backends may leave out what only gradients need: the
    kernel backends of MLX save some 2 us for each output of a call, which decoding notices. A
    gradient through such a call is an error of the library's own (in MLX that of a custom kernel),
    never zero; backends that save nothing still give it. In JAX such a call is its plain formulas,
    which JAX differentiates itself: the way to forward mode (``jax.jvp``, ``linearize``,
    ``jacfwd``), which it has not for functions with a vjp of their own.

    Inside ``mx.compile`` what holds is what held when the function was traced. Nests, and holds in
    its own thread alone.

    Examples
    --------
    >>> import numpy as np
    >>> import mhc_core as mhc
    >>> with mhc.no_grad():
    ...     h = mhc.aggregate(np.ones((3, 4, 8)), np.full(4, 0.25))
    >>> h.shape
    (3, 8)
    """
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted() -> bool:
    """Return whether gradients may be taken of what is called now; for backends."""
    return _wanted.get()
