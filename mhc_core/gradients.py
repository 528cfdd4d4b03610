"""The switch for gradients: in inference, backends may skip what only gradients need."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["no_grad", "wanted"]

_wanted: ContextVar[bool] = ContextVar("mhc_gradients_wanted", default=True)


@contextmanager
def no_grad() -> Generator[None]:
    """Declare that no gradient will be taken of the ops called inside the ``with`` block.

    The results are the same, bit for bit. Backends may leave out what only gradients need: the
    kernel backends of MLX save some 2 us for each output of a call, which is noticeable in
    decoding. Taking a gradient through such a call raises the library's own error (in MLX that of a
    custom kernel) and never returns zero; backends that save nothing still return the gradient. In
    JAX such a call runs the plain formulas, which JAX differentiates itself. This gives forward
    mode (``jax.jvp``, ``linearize``, ``jacfwd``), which JAX does not have for functions with a
    custom vjp.

    Inside ``mx.compile``, the setting at trace time holds. Blocks nest, and each affects its own
    thread only.

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
    """Return whether gradients may be taken of the current call; for backends."""
    return _wanted.get()
