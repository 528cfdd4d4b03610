"""Every peer by name."""

from __future__ import annotations

import difflib
import functools

from mhc_peers.adapters import (
    hyper_connections,
    liger,
    maxtext,
    megatron,
    mhc_mlx,
    mlx_lm,
    mlx_mhc,
    mlx_vlm,
    tile_kernels,
    tokamax,
    transformer_engine,
    transformers,
)
from mhc_peers.declaration import Peer

__all__ = ["named", "peers"]

ADAPTERS = (
    transformers,
    tile_kernels,
    megatron,
    liger,
    transformer_engine,
    hyper_connections,
    mlx_lm,
    mlx_vlm,
    mlx_mhc,
    mhc_mlx,
    tokamax,
    maxtext,
)


@functools.cache
def peers() -> dict[str, Peer]:
    """Return every peer by name, in the order of the table."""
    return {peer.name: peer for adapter in ADAPTERS for peer in adapter.PEERS}


def named(name: str) -> Peer:
    """Return a peer; raise ValueError with the nearest name for one that is not known."""
    known = peers()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no peer is named {name!r}{hint}; there are {', '.join(known)}")
    return known[name]
