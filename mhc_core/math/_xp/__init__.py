"""The operations beyond the array API standard: the only files that tell libraries apart."""

from mhc_core.math._xp.arrays import (
    clamped,
    constant,
    doubled,
    keeps_axes,
    largest,
    log_sum_exp,
    share_of_largest,
    shift,
    sigmoid,
    stopped,
    sum_to,
    sum_tokens,
    swap,
    tokens,
    within,
)
from mhc_core.math._xp.devices import channels, over_channels
from mhc_core.math._xp.fusion import fused
from mhc_core.math._xp.libraries import (
    as_dtype_of,
    e4m3_bits,
    from_e4m3_bits,
    namespace,
    reinterpreted,
    upcast,
)
from mhc_core.math._xp.loops import (
    inverse,
    scan,
    scan_reverse,
    scan_while,
)
from mhc_core.math._xp.products import collapse, dot, matmul, mean_square, mix, outer
from mhc_core.math._xp.projection import gram, merged, project, unproject

__all__ = [
    "as_dtype_of",
    "channels",
    "clamped",
    "collapse",
    "constant",
    "dot",
    "doubled",
    "e4m3_bits",
    "from_e4m3_bits",
    "fused",
    "gram",
    "inverse",
    "keeps_axes",
    "largest",
    "log_sum_exp",
    "matmul",
    "mean_square",
    "merged",
    "mix",
    "namespace",
    "outer",
    "over_channels",
    "project",
    "reinterpreted",
    "scan",
    "scan_reverse",
    "scan_while",
    "share_of_largest",
    "shift",
    "sigmoid",
    "stopped",
    "sum_to",
    "sum_tokens",
    "swap",
    "tokens",
    "unproject",
    "upcast",
    "within",
]
