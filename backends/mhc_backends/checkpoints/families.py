"""The families of released models with hyper-connections: their constants and their names.

Facts are those of the libraries' own code: mlx-vlm 0.7.10 (``models/glm5_next``, ``hy_v4``,
``qwen4_exp``, ``xing4_0``) and transformers 5.24 (``models/glm5_next``, ``hy_v4``, ``hy_v4_vl``,
``qwen4_exp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mhc_core.variants import DEEPSEEK_V4, DEEPSEEK_V41, GLM53_FLASH, HY_V4, XING40, Variant

__all__ = [
    "BY_TYPE",
    "DEEPSEEK",
    "GATED",
    "HUNYUAN",
    "MAPPED",
    "OTHERS",
    "QWEN4",
    "XING",
    "Family",
]

MAPPED = ("fn", "base", "scale")  # the parameters of a connection and of a head
GATED = ("norm", "down", "up", "inject")  # those of a gated residual; its head has no inject


@dataclass(frozen=True, kw_only=True, eq=False)  # each is its own key
class Family:
    """The hyper-connections of a family of models.

    Attributes
    ----------
    title
        Its name, for errors.
    variant
        The constants without a config; None for a gated residual, which has norm_eps alone.
    constants
        The config's key of each field of the variant that a config sets.
    clamp
        The config's keys of ``sinkhorn_clamp``.
    head
        Whether the streams end in a head with parameters; they end in their mean otherwise, or in
        V4.1 by the last H_pre.
    forms
        The forms of names (:mod:`mhc_backends.checkpoints.names`) that its models have.
    """

    title: str
    variant: Variant | None
    constants: Mapping[str, str] = field(default_factory=dict[str, str])
    clamp: tuple[str, str] | None = None
    head: bool = False
    forms: frozenset[str]

    @property
    def layer_parameters(self) -> tuple[str, ...]:
        """Return the parameters of a connection."""
        return GATED if self.variant is None else MAPPED

    @property
    def head_parameters(self) -> tuple[str, ...]:
        """Return the parameters of the head, if the family can have one."""
        return GATED[:-1] if self.variant is None else MAPPED


_SINKHORN = {
    "norm_eps": "rms_norm_eps",
    "sinkhorn_eps": "hc_eps",
    "sinkhorn_iterations": "hc_sinkhorn_iters",
}
_PLAIN = frozenset({"hc_attn_fn", "attn_hc.fn", "hc_head_fn"})
_OWN = frozenset({"attn_hc.phi", "hc_head.phi"})  # of mhc-core's modules, not transposed

DEEPSEEK = Family(
    title="DeepSeek-V4",
    variant=DEEPSEEK_V4,
    constants={**_SINKHORN, "pre_eps": "hc_eps"},
    head=True,
    forms=_PLAIN,
)
_DEEPSEEK_V41 = Family(
    title="DeepSeek-V4.1", variant=DEEPSEEK_V41, constants=DEEPSEEK.constants, forms=_PLAIN
)
_GLM = Family(
    title="GLM-5.3-Flash", variant=GLM53_FLASH, constants=DEEPSEEK.constants, forms=_PLAIN
)
HUNYUAN = Family(
    title="HY-V4",
    variant=HY_V4,
    constants={
        "norm_eps": "rms_norm_eps",
        "pre_eps": "hc_eps",
        "post_eps": "hc_eps",
        "post_scale": "hc_magnitude",
    },
    head=True,
    forms=_PLAIN | _OWN | {"hc_attn_layer.hc_fn", "hc_head.hc_head_fn"},
)
XING = Family(
    title="Xing4.0",
    variant=XING40,
    constants=_SINKHORN,
    clamp=("mhc_h_res_clamp_min", "mhc_h_res_clamp_max"),
    forms=_OWN | {"attn_hc.hc_fn"},
)
QWEN4 = Family(
    title="Qwen4-Exp",
    variant=None,
    head=True,
    forms=frozenset({"attn_hyper_connection.hc_norm", "hyper_connection_mixer.hc_norm"}),
)

BY_TYPE: Mapping[str, Family] = {
    "deepseek_v4": DEEPSEEK,
    "deepseek_v41": _DEEPSEEK_V41,
    "glm5_next": _GLM,
    "glm5_next_text": _GLM,
    "hy_v4": HUNYUAN,
    "hy_v4_vl": HUNYUAN,
    "hy_v4_vl_text": HUNYUAN,
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "xing4_0": XING,
}
"""The family of each ``model_type`` of a ``config.json``."""

OTHERS: Mapping[str, str] = {"kimi_k3": "attention residuals are not hyper-connections"}
"""Other ways to widen the residual path, by ``model_type``: why they are refused."""
