"""Other projects' implementations of mHC, each run in a process of its own."""

from mhc_peers.declaration import Op, Peer

__all__ = ["Op", "Peer"]
