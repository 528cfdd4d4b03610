"""``accelerate`` beside the ``shard`` and ``pipeline`` of mlx-lm's and mlx-vlm's models.

For ``tests/mlx_nn/processes.py --all``, in every process.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import small

from mhc_backends.mlx_nn.models import sublayers
from mhc_core.mlx import accelerate

SHARDS = ("mlx-lm V4.1", "mlx-vlm V4")
PIPELINES = ("mlx-lm V4.1", "mlx-vlm V4")
# without rounding, and with all experts and entries chosen, so that nothing can turn over
SIZES: dict[str, dict[str, Any]] = {
    "mlx-lm V4.1": {**small.UNROUNDED, **small.SMOOTH},
    "mlx-vlm V4": small.SMOOTH,
}


def _inner(model: Any) -> Any:
    """Return the module with the layers, which is pipelined."""
    return getattr(model, "language_model", model).model


def _shard(model: Any, group: Any) -> None:
    getattr(model, "language_model", model).shard(group)


def compared(group: Any) -> dict[str, float]:
    """Return how far the library's logits are from those of one process, and ours from its own.

    "before" and "after" say when the model was accelerated; a pipelined one needs it again.
    """
    sublayers.FEW = 0  # else so few tokens stay on the library's own code
    ids = small.tokens(2, small.LONG)
    found: dict[str, float] = {}
    for name in dict.fromkeys((*SHARDS, *PIPELINES)):

        def make(name: str = name) -> Any:
            return small.MAKE[name](**SIZES[name])

        whole = small.logits(make(), ids)
        for way, families in (("shard", SHARDS), ("pipeline", PIPELINES)):
            if name not in families:
                continue
            plain = whole
            for kind in ("plain", "before", "after"):
                model = make()
                if kind == "before":
                    accelerate(model)
                if way == "shard":
                    _shard(model, group)
                else:
                    _inner(model).pipeline(group)
                if kind == "after" or (kind, way) == ("before", "pipeline"):
                    accelerate(model)
                got = small.logits(model, ids)
                mx.eval(got)
                found[f"{name}, {way}, {kind}"] = small.apart(got, plain)
                if kind == "plain":
                    plain = got
    return found
