"""identity: the streams are not mixed. H_res has no logits, and no matrix is made."""

from __future__ import annotations

from typing import Any

from mhc_core.mixer import Mixer


def _none(n: int, **_: Any) -> int:
    return 0


def _init(n: int, **_: Any) -> list[float]:
    return []


MIXER = Mixer(name="identity", logits=_none, forward=None, vjp=None, init=_init)
