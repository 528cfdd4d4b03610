"""The mixers that come with mhc-core, a module each, and what authors of mixers need.

A mixer makes the matrix H_res of each token from its logits; :class:`mhc_core.mixer.Mixer` is its
declaration. ``docs/mixers.md`` has the formulas, and a mixer of one's own step by step.
"""

from __future__ import annotations

from typing import Any


def namespace(array: Any) -> Any:
    """Return the array API namespace of an array."""
    from mhc_core.math import _xp  # which a variant that names a mixer does not need yet

    return _xp.namespace(array)


def constant(values: Any, like: Any) -> Any:
    """Return nested sequences of numbers as an array of the dtype of ``like``, on its device."""
    from mhc_core.math import _xp

    return _xp.constant(_xp.namespace(like), values, like)
