"""The connection, with the private names of mlx-mhc that its tests and examples use."""

from __future__ import annotations

import mlx.core as mx

from mhc_core import mlx as modules

__all__ = ["ManifoldHyperConnection"]


class ManifoldHyperConnection(modules.ManifoldHyperConnection):
    """:class:`mhc_core.mlx.ManifoldHyperConnection`; use that one in new code."""

    def _project_h_pre(self) -> mx.array:
        return self.h_pre()

    def _project_h_post(self) -> mx.array:
        return self.h_post()

    def _project_h_res(self) -> mx.array:
        return self.h_res()

    @property
    def _cached_h_pre(self) -> mx.array | None:
        return self.cached("h_pre")

    @property
    def _cached_h_post(self) -> mx.array | None:
        return self.cached("h_post")

    @property
    def _cached_h_res(self) -> mx.array | None:
        return self.cached("h_res")
